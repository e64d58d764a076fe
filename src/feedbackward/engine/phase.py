"""The phase in which a rule learns its feedback: it has the edges, their weights, and passes with changed activities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

from feedbackward.activity import Site, Source
from feedbackward.engine.attached import Attached
from feedbackward.engine.hooks import Observer
from feedbackward.engine.outside import several_processes
from feedbackward.errors import FeedbackError
from feedbackward.graph import Edge
from feedbackward.model.example import copied, run
from feedbackward.model.state import preserved
from feedbackward.operators.base import Weights

if TYPE_CHECKING:
    from feedbackward.schedules.passes import LossFn


@dataclass(frozen=True)
class Pass:
    """The activities of one plain forward pass, by site, as the layers below made them; and the sources, by name."""

    sites: Mapping[Site, Tensor]
    sources: Mapping[str, Tensor]
    output: Any


class Phase:
    """One call of `learner.feedback_step(inputs, loss_fn)`.

    It changes nothing of the model except the gradients of its weights, if the rule `revises` them.

    Attributes:
        edges: the feedback graph's edges.
        inputs: as the user gave them.
    """

    def __init__(self, attached: Attached, inputs: Any, loss_fn: LossFn | None = None) -> None:
        self._attached, self.inputs, self._loss_fn = attached, inputs, loss_fn
        self.edges = attached.graph.edges
        self._sites, self._sources = attached.graph.sites, attached.graph.sources
        # drawn here, because a pass restores the generator
        self._seed = int(torch.randint(2**62, ()))
        self._generators: dict[torch.device, torch.Generator] = {}

    def part(self, edges: Sequence[Edge], samples: int | None = None) -> Phase:
        """The phase of some edges only. Its passes observe their sites and sources, on the first `samples` of the batch."""
        phase = Phase(self._attached, _first(self.inputs, samples), self._loss_fn)
        phase.edges = tuple(edges)
        phase._sites = tuple(dict.fromkeys(edge.site for edge in edges))
        phase._sources = tuple(dict.fromkeys(edge.source for edge in edges))
        return phase

    def weights(self, edge: Edge) -> Weights:
        """The edge's feedback weights, Parameters where they are learned."""
        return self._attached.weights_of(edge)

    def weight(self, name: str) -> Tensor:
        """A weight of the model by its name, detached. The weight of a layer input is `layer_input.weight`."""
        return self._attached.model.get_parameter(name).detach()

    def trainable(self) -> dict[str, Tensor]:
        """The model's parameters that train, by name."""
        named = self._attached.model.named_parameters()
        return {name: p for name, p in named if p.requires_grad}

    def moved(self, rate: float) -> dict[str, Tensor]:
        """The model's parameters that have gradients, after a step along these: new leaves, by name."""
        found = self.trainable().items()
        moved = {n: (p - rate * p.grad).detach() for n, p in found if p.grad is not None}
        if not moved:
            raise FeedbackError(
                f"{self._attached.rule.label} goes on from the step of the backward pass, but no weight has a gradient: call "
                "`learner.feedback_step(x, loss_fn)` after the backward pass and before `optimizer.step()`."
            )
        return {name: p.requires_grad_() for name, p in moved.items()}

    def loss(self, output: Any) -> Tensor:
        """The network's loss for the output of a pass. Raises FeedbackError if the user gave no loss."""
        if self._loss_fn is None:
            raise FeedbackError(
                f"{self._attached.rule.label} needs the loss in its phase: call `learner.feedback_step(x, loss_fn)`, for example with "
                "`lambda output: F.cross_entropy(output, y)`."
            )
        return self._loss_fn(output)

    def forward(
        self,
        change: Callable[[Site, Tensor], Tensor] | None = None,
        gradients: bool = False,
        onward: Callable[[Source, Tensor], Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Pass:
        """A plain forward pass on the inputs, without cuts, in the model's current mode.

        `change(site, h)` returns what the layers above a site get in place of its activity, and `onward(source, a)` does the
        same for a source. With `gradients` autograd records the pass. `weights` replace the parameters of these names. Buffers
        and random state are restored afterwards.
        """
        model = self._attached.model

        def under(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, dict(weights or {}), args, kwargs)

        observer = Observer(self._sites, self._sources, change, onward)
        with ExitStack() as stack:
            stack.enter_context(preserved(model))
            stack.enter_context(torch.set_grad_enabled(gradients))
            for handle in observer.install(model, prepend=True):
                stack.callback(handle.remove)
            tape = stack.enter_context(observer.recording())
            output = run(under if weights else model, copied(self.inputs))
        activities = {
            site: h for site, h in zip(observer.sites, tape.h, strict=True) if h is not None
        }
        return Pass(activities, {k: v for k, v in tape.sources.items() if v is not None}, output)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal noise of this shape, device and dtype, new in every call and phase.

        Torch's own generators would give the same noise in every phase, because a pass restores them.
        """
        if like.device not in self._generators:
            self._generators[like.device] = torch.Generator(like.device).manual_seed(self._seed)
        generator = self._generators[like.device]
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)

    def perturbed(self) -> list[tuple[Edge, Tensor, Tensor]]:
        """For every edge: how its source moves, `[M, *source]`, and the noise along which its site moves, `[M, *site]`.

        In one forward-mode pass all sites move along standard normal noise `u` at once. A source then moves by the sum of
        `dsource/dh u` over the sites below it, sample by sample. A movement ends at a source once every moving site has
        reached the sources that feed it, so with relays a source moves by the noise of its own sites alone. The pass runs
        without autocast; the results have the dtype of the edge's weights.

        Raises FeedbackError where a layer has no forward-mode derivative.
        """
        noise: dict[Site, Tensor] = {}
        moving: dict[Site, Tensor] = {}

        def push(site: Site, h: Tensor) -> Tensor:
            # a second consumer gets the same tensor
            if site not in moving:
                still, tangent = forward_ad.unpack_dual(h)
                noise[site] = self.noise(still)
                total = noise[site] if tangent is None else tangent + noise[site]
                moving[site] = forward_ad.make_dual(still, total)
                waiting.update(feeders[site])
            return moving[site]

        # the sources that the noise of a site below has not reached yet
        waiting: set[str] = set()
        feeders = {
            site: {e.source.name for e in self.edges if e.site == site} for site in self._sites
        }

        def end(source: Source, a: Tensor) -> Tensor:
            waiting.discard(source.name)
            return a if waiting else forward_ad.unpack_dual(a).primal

        device = next(self._attached.model.parameters()).device.type
        try:
            # fused attention has no forward-mode derivative, and norms under autocast return theirs in another dtype
            with (
                forward_ad.dual_level(),
                sdpa_kernel(SDPBackend.MATH),
                torch.autocast(device, enabled=False),
            ):
                met = self.forward(change=push, onward=end).sources
                moves = {
                    name: forward_ad.unpack_dual(source).tangent for name, source in met.items()
                }
        except NotImplementedError as error:
            raise FeedbackError(
                f"{self._attached.rule.label} differentiates the forward pass in forward mode, which a layer of this model does not "
                f"support ({str(error).splitlines()[0]}). Replace that layer, or use a rule that learns from the error (DKP)."
            ) from error
        found = []
        for edge in self.edges:
            move, dtype = moves[edge.source.name], self.weights(edge)[0].dtype
            d = torch.zeros_like(met[edge.source.name]) if move is None else move
            pair = (t.to(dtype).flatten(0, edge.leading - 1) for t in (d, noise[edge.site]))
            found.append((edge, *pair))
        return found  # type: ignore[return-value]

    def give(self, edge: Edge, grads: Weights) -> None:
        """Add to the gradients of the edge's learnable weights, in their order.

        With several processes the mean over them is added, as DistributedDataParallel does in a backward pass.
        """
        for weight, grad in zip(self.weights(edge), grads, strict=False):
            _add(weight, grad)

    def revise(self, grads: Mapping[str, Tensor]) -> None:
        """For a rule that `revises`: add to the gradients of the model's parameters (the mean over processes)."""
        for name, grad in grads.items():
            _add(self._attached.model.get_parameter(name), grad)


def _first(inputs: Any, samples: int | None) -> Any:
    """The inputs of the first samples.

    The batch is the first dimension of the first tensor, and of all tensors of the same length.
    """
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()]
    if samples is None or not tensors:
        return inputs
    batch = len(tensors[0])
    return tree_map_only(
        Tensor, lambda t: t[:samples] if t.dim() and len(t) == batch else t, inputs
    )


def _add(weight: Tensor, grad: Tensor) -> None:
    grad = _mean_of_ranks(grad.detach().to(weight.dtype))
    weight.grad = grad if weight.grad is None else weight.grad + grad


def _mean_of_ranks(grad: Tensor) -> Tensor:
    if not several_processes():
        return grad
    total = grad.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()
