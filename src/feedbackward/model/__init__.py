"""What is read from a model: one recorded forward pass, its sites and its layers."""
