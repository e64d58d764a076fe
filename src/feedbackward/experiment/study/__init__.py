"""Studies: grids of comparisons, written down as a config, run cell by cell, told in one table and page."""
