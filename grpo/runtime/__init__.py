"""Processes, signals, files and the terminal; knows nothing of GRPO."""
