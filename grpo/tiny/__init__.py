"""The embedded world: ESI vignettes, a Qwen3.5 in miniature, and how it was taught."""
