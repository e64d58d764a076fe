"""Controls: backprop, frozen features, flipped signals."""
