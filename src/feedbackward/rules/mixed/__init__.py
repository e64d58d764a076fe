"""Several rules in one network, and presets of them."""
