"""One file per command of ``python -m grpo``: parse the arguments, call a room, print."""
