"""Feedback operators: the form of the feedback weights, independent of the rule."""

from .base import Operator, Shape, Weights
from .binary import Binary
from .dense import Dense
from .kernel import Kernel
from .layer import LayerForm, LayerShaped
from .layer_kernel import LayerKernel
from .low_rank import LowRank
from .per_shape import PerShape
from .pooled import Pooled
from .product import Product
from .seeded import Seeded
from .shared import Shared
from .signed import FixedSigned, FreshSigned, Signed, UniformSigned
from .sparse import Sparse

# by their names in configurations and on the command line
OPERATORS: dict[str, type[Operator]] = {
    "dense": Dense,
    "shared": Shared,
    "sparse": Sparse,
    "binary": Binary,
    "low_rank": LowRank,
    "pooled": Pooled,
    "per_shape": PerShape,
    "kernel": Kernel,
    "seeded": Seeded,
}

__all__ = [
    "OPERATORS",
    "Binary",
    "Dense",
    "FixedSigned",
    "FreshSigned",
    "Kernel",
    "LayerForm",
    "LayerKernel",
    "LayerShaped",
    "LowRank",
    "Operator",
    "PerShape",
    "Pooled",
    "Product",
    "Seeded",
    "Shape",
    "Shared",
    "Signed",
    "Sparse",
    "UniformSigned",
    "Weights",
]
