"""rules/controls"""
