"""experiment/data"""
