"""Data sets, their cache, and the loader."""
