"""Read a recorded run back: compare, recompute, rescore, show."""
