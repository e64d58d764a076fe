"""Grids of runs: comparisons and studies."""
