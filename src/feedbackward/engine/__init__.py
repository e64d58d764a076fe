"""Cutting the graph and routing the errors: hooks, cuts, autograd functions, feedback weights."""
