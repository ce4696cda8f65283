"""Hand-written passes of the recipe's own architecture: decoding with a cache, and the differentiable forward pass."""
