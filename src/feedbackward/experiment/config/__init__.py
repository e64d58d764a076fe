"""experiment/config"""
