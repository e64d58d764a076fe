"""Rules made of parts: several rules in one network, and delayed backprop."""
