"""The error that a person can mend."""

from rewards import RewardError


class UserError(ValueError):
    """Something that the person who started the program can mend: a config, a file, a folder, a model.

    The message says what was expected, what came, where, and what to do. Commands print it as one line and exit with 2;
    any other exception is a fault of the program and keeps its traceback.
    """


INPUT_ERRORS = (UserError, RewardError)
"""What a command prints as one line and ends with exit code 2; `rewards` knows nothing of `grpo` and has its own."""
