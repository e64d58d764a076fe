"""Whether the weights that feedback was measured on are those that the model is trained from."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
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
        self._noted = self._versions(
            edge
            for edge in graph.edges
            if isinstance(edge.site, LayerInput)
            and any(getattr(part, "init", None) in MEASURED_INITS for part in within(edge.operator))
        )

    def warn(self) -> None:
        """Once, in the first pass: a checkpoint that is loaded after `attach` leaves the feedback where it was."""
        if not self._noted:
            return
        noted, self._noted = self._noted, {}
        for edge, now in self._versions(noted).items():
            before, name = noted[edge], edge.site.weight  # type: ignore[attr-defined]
            # shards and what a functional call puts in place have versions of their own
            weight = weight_named(self._model, name)
            own = isinstance(weight, nn.Parameter) and not is_shard(weight)
            if own and before[0] != now[0] and before[1] == now[1]:
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
        now, there = self._versions(self._noted), copied._versions(self._noted)
        copied._noted = {
            edge: there[edge] if before == now[edge] else (-1, there[edge][1])
            for edge, before in self._noted.items()
        }
        return copied

    def _versions(self, edges: Iterable[Edge]) -> dict[Edge, tuple[int, int]]:
        """How often the weight of each edge's layer, and the feedback over it, were written."""
        return {
            edge: (
                weight_named(self._model, edge.site.weight)._version,  # type: ignore[attr-defined]
                weights_of(self._feedback, edge)[0]._version,
            )
            for edge in edges
        }
