"""rules/direct"""
