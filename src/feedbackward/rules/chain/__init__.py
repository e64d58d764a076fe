"""Rules that send the error from layer to layer through feedback weights."""
