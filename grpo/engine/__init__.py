"""The engines behind `grpo.rollout`: prompts and noise in, ids and the log-probabilities they were drawn with out."""
