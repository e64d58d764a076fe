"""rules/mixed"""
