"""Hooks, cuts, autograd functions, feedback weights, and the plan of which signal trains what."""
