"""The error a user can fix."""

from rewards import RewardError


class UserError(ValueError):
    """Something the user can fix: a config, a file, a folder, a model.

    The message gives what was expected, what came, where, and what to do. Commands print it without a traceback and
    exit with 2; any other exception is a bug and keeps its traceback.
    """


INPUT_ERRORS = (UserError, RewardError)
"""Errors that commands report with exit code 2; `rewards` does not import `grpo` and has its own."""
