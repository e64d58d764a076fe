"""One training run: building, steps, checkpoints, records."""
