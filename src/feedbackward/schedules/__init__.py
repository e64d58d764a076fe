"""When the backward of each segment runs. A schedule changes no gradient."""
