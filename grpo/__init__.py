"""A hand-written GRPO trainer: every piece of the v49 recipe in the open."""

__version__ = "0.1.0"
