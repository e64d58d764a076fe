"""How near a rule comes to backprop, and what it costs."""
