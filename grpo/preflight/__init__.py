"""Checks before a run: is the reward sound, does a blind policy win, does the model fit."""
