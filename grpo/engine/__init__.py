"""The engines behind `grpo.rollout`: prompts and noise → token ids and the log-probabilities they were drawn with."""
