"""The feedback weights of a graph: one module holds them, and they are the same on every rank and device."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from feedbackward.activity import LayerInput
from feedbackward.engine.size import refuse_too_large
from feedbackward.errors import AttachError, FeedbackError
from feedbackward.graph import Edge, Graph, feedback_key
from feedbackward.operators.base import Weights, within
from feedbackward.operators.layer import MEASURED_INITS, LayerShaped


def fitted(graph: Graph, seed: int) -> Graph:
    """The graph with each edge's operator as it serves that edge.

    Raises AttachError, naming the site, where an operator cannot serve an edge or cannot be learned.
    """
    edges = []
    for edge in graph.edges:
        try:
            operator = edge.operator.fit(edge.source_shape, edge.site_shape, digest(seed, edge.key))
        except AttachError as error:
            raise AttachError(f"site {edge.site.name!r}: {error}") from error
        if edge.rule.learned and edge.shares is None and not operator.learnable:
            raise AttachError(
                f"{edge.rule.label} learns its feedback, and {type(operator).__name__} feedback cannot be learned: use Dense, "
                "LowRank, Sparse or Pooled, or a rule with fixed feedback (DFA)."
            )
        newly_common = operator.common and not edge.operator.common
        edges.append(replace(edge, operator=operator, key="" if newly_common else edge.key))
    return replace(graph, edges=tuple(edges))


def make_feedback(model: nn.Module, graph: Graph, seed: int, dtype: torch.dtype | None) -> Feedback:
    """The weights of every edge and the auxiliary network of every local loss, on the model's device.

    Floating-point weights are `dtype`; by default float64 for a float64 model, else float32. Parameters where their rule
    learns them, else buffers.
    """
    reference = next(p for p in model.parameters() if p.is_floating_point())
    if dtype is None:
        dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
    refuse_too_large(graph, dtype, reference.device)
    drawn = partial(_draw, graph, seed, dtype, reference.dtype)
    feedback = Feedback(drawn)
    drawn(reference.device, model, feedback)
    return feedback


class Feedback(nn.Module):
    """Holds the feedback weights.

    They are drawn again when `to_empty` gives them memory: on the meta device they had no values, elsewhere these are lost.
    """

    def __init__(self, drawn: Callable[..., nn.Module]) -> None:
        super().__init__()
        self._drawn = drawn
        # whether the weights were seen to have values, which they lose in `_apply` only
        self._seen = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Feedback:
        self._seen = False
        without_values = self.on_meta()
        super()._apply(fn, recurse)
        if without_values and not self.on_meta():
            self.draw()
        return self

    def to_empty(self, *, device: Any, recurse: bool = True) -> Feedback:
        """Move to a device, with the values that the seed gives.

        Raises AttachError, before anything is lost, where the values were measured on a layer.
        """
        self.drawn_on("meta")
        super().to_empty(device=device, recurse=recurse)
        self.draw()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *given: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *given)
        for name, own in (
            *self.named_parameters(recurse=False),
            *self.named_buffers(recurse=False),
        ):
            kept = state_dict.get(prefix + name)
            if kept is not None and kept.shape != own.shape:
                # the last of what is given is the list of errors
                given[-1].append(
                    f"the feedback was saved by a learner that was attached otherwise: {name!r} has the shape "
                    f"{list(kept.shape)} there, and {list(own.shape)} here. Attach as then: with its operator, and with its "
                    "`error_at` (the first number is that of "
                    'the units whose error is sent). In earlier versions DKP\'s default was fb.DKP(operator=fb.Dense("zeros")), and '
                    "the error was that of the output also where the output is scores of a vocabulary."
                )
                return

    def draw(self) -> None:
        """Give the weights the values that they began with. Raises AttachError where these were measured on a layer."""
        if not self.on_meta():
            self.load_state_dict(self.drawn_on("cpu").state_dict())

    def drawn_on(self, device: str) -> nn.Module:
        """The weights that the seed gives. Raises AttachError where they were measured on a layer."""
        return self._drawn(torch.device(device), None, nn.Module())

    def on_meta(self) -> bool:
        """Whether the weights have no values."""
        # a compiled pass must not depend on what changes in the first one
        if torch.compiler.is_compiling() or not self._seen:
            meta = any(t.is_meta for t in (*self.parameters(), *self.buffers()))
            if not torch.compiler.is_compiling():
                self._seen = not meta
            return meta
        return False


def _draw(
    graph: Graph,
    seed: int,
    dtype: torch.dtype,
    model_dtype: torch.dtype,
    device: torch.device,
    model: nn.Module | None,
    holder: nn.Module,
) -> nn.Module:
    """Fill the holder. Without a model there are no layers to measure, so no feedback may begin mirrored."""
    for edge in _distinct(graph):
        generator = torch.Generator().manual_seed(digest(seed, edge.key))
        with _drawn_on(device):
            made = edge.operator.create(edge.source_shape, edge.site_shape, generator)
        made = tuple(w.to(device, dtype if w.is_floating_point() else None) for w in made)
        with _drawn_on(device):
            made = _measured(model, edge, made, generator)
        for i, (name, weight) in enumerate(zip(weight_names(edge), made, strict=True)):
            if edge.rule.learned and i < edge.operator.learnable:
                holder.register_parameter(name, nn.Parameter(weight))
            else:
                holder.register_buffer(name, weight)
    for local in graph.local:
        with torch.random.fork_rng(devices=[]), _drawn_on(device):
            torch.manual_seed(digest(seed, local.key))
            read = [] if local.above is None else [holder.get_submodule(feedback_key(local.above))]
            auxiliary = local.network(*read)
        holder.add_module(local.key, auxiliary.to(device, model_dtype))
    return holder


def _measured(
    model: nn.Module | None, edge: Edge, made: Weights, generator: torch.Generator
) -> Weights:
    """The initial weights of an edge, where they depend on the layer that it leads over."""
    site, operator = edge.site, edge.operator
    inits = {getattr(part, "init", None) for part in within(operator)}
    measured = next((init for init in MEASURED_INITS if init in inits), None)
    if model is None and measured:
        raise AttachError(
            f"site {site.name!r}: feedback with init={measured!r} is measured on the layer's weight, which has no values where the "
            "model is on the meta device or emptied. Attach after the weights are there, or use init='like_layer'."
        )
    if model is None:
        return made
    if (
        isinstance(operator, LayerShaped)
        and isinstance(site, LayerInput)
        and edge.source == site.source
    ):
        layer = weight_named(model, site.weight)
        # measured in the precision of the feedback, whatever a pass around would take
        usual = nullcontext() if layer.is_meta else torch.autocast(layer.device.type, enabled=False)
        with usual:
            return operator.measure(made, layer, edge.source_shape, edge.site_shape, generator)
    if measured:
        raise AttachError(
            f"site {site.name!r}: feedback with init={measured!r} must have the form of a layer's weight and lead over that "
            f"layer alone; this is {type(operator).__name__} feedback from {edge.source.name!r}. Use another init."
        )
    return made


def weights_of(feedback: nn.Module, edge: Edge) -> Weights:
    """The tensors of an edge, in the order of its operator's parts."""
    return tuple([getattr(feedback, name) for name in edge.names])


def weight_named(model: nn.Module, name: str) -> Tensor:
    """The weight of this name, or what stands for it within `torch.func.functional_call`."""
    owner, _, leaf = name.rpartition(".")
    weight: Tensor = getattr(model.get_submodule(owner), leaf)
    return weight


def weight_names(edge: Edge) -> tuple[str, ...]:
    """The names of an edge's tensors: the first is the edge's own."""
    return edge.names


def refuse_without_values(feedback: Feedback, model: nn.Module) -> None:
    """Refuse feedback that is on the meta device still, while the model has values."""
    if feedback.on_meta() and not any(p.is_meta for p in model.parameters()):
        raise FeedbackError(
            "the model has values by now, but its feedback is on the meta device, where it was attached. Call "
            "`learner.to_empty(device=...)`, which draws the feedback, before the model gets its weights; or "
            "`learner.feedback.to_empty(device=...)` now."
        )


def refuse_frozen_zeros(feedback: nn.Module, graph: Graph) -> None:
    """Refuse an edge whose feedback is zero, and whose rule learns it, but which trains no more.

    Weights on the way to learning are not looked at, so that nothing waits for a device.
    """
    # a compiler cannot branch on values
    if torch.compiler.is_compiling():
        return
    for edge in graph.edges:
        if not edge.rule.learned or not edge.operator.learnable:
            continue
        weights = weights_of(feedback, edge)[: edge.operator.learnable]
        if not any(w.requires_grad or w.is_meta or bool(w.any()) for w in weights):
            raise FeedbackError(
                f"the feedback weights of site {edge.site.name!r} are zero and do not require gradients, so the layers below it "
                f"would never train. Let them learn, or begin at random: {edge.rule.label} with operator=fb.Dense(), or DFA."
            )


def count_bytes(tensors: Iterator[Tensor] | Weights) -> int:
    """Bytes of all these tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def _drawn_on(device: torch.device) -> Iterator[None]:
    """Draw weights on the CPU in float32, so that they are the same whatever the default device and dtype are.

    For a model on the meta device nothing is drawn and nothing is allocated.
    """
    ambient = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("meta" if device.type == "meta" else "cpu"):
            yield
    finally:
        torch.set_default_dtype(ambient)


def _distinct(graph: Graph) -> list[Edge]:
    """One edge per set of weights: the edge to the largest site, if several share a set."""
    largest: dict[str, Edge] = {}
    for edge in graph.edges:
        known = largest.get(edge.key)
        if known is None or math.prod(edge.site_shape) > math.prod(known.site_shape):
            largest[edge.key] = edge
    return list(largest.values())


def digest(*parts: object) -> int:
    """A seed that these parts alone decide; neighbouring ones give unrelated numbers."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
