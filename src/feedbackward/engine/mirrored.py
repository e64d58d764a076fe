"""Whether the weights that feedback was measured on are those that the model is trained from."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import nn

from feedbackward.activity import LayerInput
from feedbackward.engine.outside import is_shard
from feedbackward.engine.weights import weight_named, weights_of
from feedbackward.graph import Edge, Graph
from feedbackward.operators.base import within
from feedbackward.operators.layer import MEASURED_INITS


class Mirrored:
    """The versions that weights and the feedback measured on them had at `attach`, until the first training pass."""

    def __init__(self, model: nn.Module, feedback: nn.Module, graph: Graph) -> None:
        self._model, self._feedback = model, feedback
        self._edges = {
            edge: edge.site.weight
            for edge in graph.edges
            if isinstance(edge.site, LayerInput)
            and any(getattr(part, "init", None) in MEASURED_INITS for part in within(edge.operator))
        }
        self._noted = self._versions(self._edges)

    def warn(self) -> None:
        """Once, in the first pass: a checkpoint that is loaded after `attach` leaves the feedback where it was."""
        edges, self._edges = self._edges, {}
        noted, self._noted = self._noted, []
        now = self._versions(edges) if edges else []
        for before, after, name in zip(noted, now, edges.values(), strict=True):
            # shards and what a functional call puts in place have versions of their own
            weight = weight_named(self._model, name)
            own = isinstance(weight, nn.Parameter) and not is_shard(weight)
            if own and before[0] != after[0] and before[1] == after[1]:
                warnings.warn(
                    f"{name!r} was loaded or initialised after the model was attached, but its feedback was measured on the "
                    "weight that was there before. Attach to the model that has the weights it will be trained from, or load the "
                    "learner's own state_dict.",
                    stacklevel=5,
                )
                return

    def __deepcopy__(self, memo: dict[int, Any]) -> Mirrored:
        """A copy's tensors have versions of their own; what had changed before the copy stays noted as changed."""
        copied = copy.copy(self)
        copied._model, copied._feedback = copy.deepcopy((self._model, self._feedback), memo)
        now, there = self._versions(self._edges), copied._versions(self._edges)
        copied._noted = [
            new if before == after else (-1, new[1])
            for before, after, new in zip(self._noted, now, there, strict=True)
        ]
        return copied

    def _versions(self, edges: dict[Edge, str]) -> list[tuple[int, int]]:
        weights = [weight_named(self._model, name) for name in edges.values()]
        feedback = [weights_of(self._feedback, edge)[0] for edge in edges]
        return [(W._version, B._version) for W, B in zip(weights, feedback, strict=True)]
