"""Feedback operators: the form of the feedback weights, independent of the rule.

`OPERATORS` has those that a user chooses, by their names in configurations and on the command line.
The others belong to the rules that make them. A `Shape` is a tuple of integers, and the `Weights` of
an edge are a tuple of tensors.

Example:
    >>> import feedbackward as fb
    >>> fb.operators.OPERATORS["sparse"](nonzeros=2)
    Sparse(nonzeros=2, scale=1.0)
"""

from feedbackward.operators.auto import Auto
from feedbackward.operators.base import Operator, Shape, Weights
from feedbackward.operators.binary import Binary
from feedbackward.operators.dense import Dense
from feedbackward.operators.kernel import Kernel
from feedbackward.operators.layer import LayerForm, LayerShaped
from feedbackward.operators.layer_kernel import LayerKernel
from feedbackward.operators.low_rank import LowRank
from feedbackward.operators.orthogonal import Orthogonal
from feedbackward.operators.per_shape import PerShape
from feedbackward.operators.pooled import Pooled
from feedbackward.operators.product import Product
from feedbackward.operators.seeded import Seeded
from feedbackward.operators.shared import Shared
from feedbackward.operators.signed import FixedSigned, FreshSigned, Signed, UniformSigned
from feedbackward.operators.sparse import Sparse

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
    "auto": Auto,
}

__all__ = [
    "OPERATORS",
    "Auto",
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
    "Orthogonal",
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
