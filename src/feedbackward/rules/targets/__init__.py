"""rules/targets"""
