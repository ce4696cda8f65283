"""The series of the model card run again on the embedded world: ``python -m benchmarks.series``."""
