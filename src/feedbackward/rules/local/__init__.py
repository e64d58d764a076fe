"""rules/local"""
