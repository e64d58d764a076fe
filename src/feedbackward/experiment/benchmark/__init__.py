"""Measured step times and counted costs on named nets."""
