"""The forward pass that is trained through: prompts and completions in, the hidden states that predict them out."""
