"""When the backward pass of each segment runs, and gradients that arrive late."""
