"""Configurations and the command line that sets them."""
