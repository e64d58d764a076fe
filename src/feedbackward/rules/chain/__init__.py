"""rules/chain"""
