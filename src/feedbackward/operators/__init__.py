"""Feedback operators: the form of the feedback weights, independent of the rule."""

from .base import Operator
from .dense import Dense

__all__ = ["Dense", "Operator"]
