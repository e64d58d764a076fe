"""Rules that send targets."""
