"""Answers to cases, judged: rates with intervals, what failed and why, two evaluations compared."""
