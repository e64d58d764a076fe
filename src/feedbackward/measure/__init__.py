"""The probe (the angle to backprop) and the counted cost of a training step."""
