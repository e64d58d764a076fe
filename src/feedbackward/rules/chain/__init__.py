"""Rules that send the error from layer to layer, without the transposed weights."""
