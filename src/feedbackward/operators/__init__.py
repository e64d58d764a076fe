"""Feedback operators: the form of the feedback weights, independent of the rule."""

from .base import Operator
from .dense import Dense
from .layer import LayerForm, LayerShaped

__all__ = ["Dense", "LayerForm", "LayerShaped", "Operator"]
