"""The makers of the embedded world in `grpo/tiny`: patients, vignettes, and how the model was taught."""
