"""Feedback operators: the form of the feedback weights, independent of the rule."""

from .base import Operator, Shape, Weights
from .dense import Dense
from .layer import LayerForm, LayerShaped
from .product import Product
from .signed import FixedSigned, FreshSigned, Signed, UniformSigned

# by their names in configurations and on the command line
OPERATORS: dict[str, type[Operator]] = {
    "dense": Dense,
}

__all__ = [
    "OPERATORS",
    "Dense",
    "FixedSigned",
    "FreshSigned",
    "LayerForm",
    "LayerShaped",
    "Operator",
    "Product",
    "Shape",
    "Signed",
    "UniformSigned",
    "Weights",
]
