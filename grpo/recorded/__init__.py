"""What a run wrote down: read again, compared, computed with another reward or the model, shown in a terminal."""
