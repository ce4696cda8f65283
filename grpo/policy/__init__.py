"""The model that is trained: its base, its adapter and their files."""
