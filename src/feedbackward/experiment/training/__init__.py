"""experiment/training"""
