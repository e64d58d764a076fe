"""experiment/report"""
