"""Reading a user's model: one traced pass, its sites, its layers, its state."""
