"""experiment/benchmark"""
