"""The embedded world: ESI vignettes and a Qwen3.5 in miniature, as data. `benchmarks/tiny_world` made it."""
