"""Comparisons and studies: grids of runs, searched, resumed, and run in several processes."""
