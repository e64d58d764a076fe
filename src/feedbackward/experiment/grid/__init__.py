"""experiment/grid"""
