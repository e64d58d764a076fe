"""What a training step costs under a rule: multiply-adds, bytes, and products that must wait for each other.

Everything is counted in passes that are really run, on a copy of the learner whose tensors have shapes but no values
(PyTorch's fake tensors): nothing is allocated, and the learner is left as it is. Multiply-adds (MACs) are those of matrix
products and convolutions, half of what `torch.utils.flop_counter` calls flops; norms and activations are not among them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from feedbackward.engine.autograd import BROADCAST, DEFER, JOIN
from feedbackward.engine.html import html_table
from feedbackward.errors import AttachError, FeedbackError
from feedbackward.graph import Edge
from feedbackward.measure.counting import Products, Saved
from feedbackward.model.autograd_graph import walk
from feedbackward.model.state import training_mode
from feedbackward.schedules.joint import Schedule
from feedbackward.schedules.passes import LossFn

if TYPE_CHECKING:
    from feedbackward.learner import Learner

OTHERS: tuple[Schedule, ...] = ("replay", "eager")


@dataclass(frozen=True)
class Cost:
    """Of one training step. MACs and bytes are of the whole batch.

    Attributes:
        batch: N, the examples in the step.
        forward, weight_gradients, input_gradients: MACs of the network itself: F, G, and what the rule leaves of D. Backprop
            does F + G + D; nothing is computed across a cut.
        feedback: MACs of the signals, from the errors to the sites.
        learning: MACs of the feedback weights' gradients, in the step.
        auxiliary: MACs of local losses' networks, forward and backward.
        phase: MACs of one call of `learner.feedback_step`, for rules that have one; not in the total.
        steps: products in sequence from the output's error to the last signal. Each layer's weight gradient is one more,
            for every rule.
        feedback_bytes: of all feedback weights and auxiliary networks.
        traffic_bytes: of the errors (or targets) that travel along the edges.
        signal_bytes: of the signals that arrive at the sites.
        held: by schedule, the most bytes that autograd holds for the backward pass at any time, without parameters and
            buffers; None where the rule or the sites do not allow the schedule.
        totals: by schedule, all MACs of a step.
        layers: for each layer, its "forward", "weight_gradients" and "input_gradients"; products of activities are "".

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> cost = fb.count_cost(learner, x)
        >>> cost.forward == 16 * (4 * 8 + 8 * 3)  # multiply-adds of the batch
        True
        >>> cost.feedback_bytes == 4 * 3 * 8, cost.steps
        (True, 1)
    """

    rule: str
    model: str
    batch: int
    forward: int
    weight_gradients: int
    input_gradients: int
    feedback: int
    learning: int
    auxiliary: int
    phase: int | None
    steps: int
    feedback_bytes: int
    traffic_bytes: int
    signal_bytes: int
    held: dict[str, int | None]
    totals: dict[str, int | None]
    layers: dict[str, dict[str, int]]

    @property
    def total(self) -> int:
        """MACs of a step in one backward pass."""
        return self.totals["joint"] or 0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}

    def _repr_html_(self) -> str:
        values = {**self.as_dict(), **{f"held, {k}": v for k, v in self.held.items()}}
        rows = [(k, f"{v:,}") for k, v in values.items() if isinstance(v, int)]
        return html_table(("", "one step"), rows, f"{self.rule} on {self.model}")


def count_cost(
    learner: Learner, example: Any, loss_fn: LossFn | None = None, target: Tensor | None = None
) -> Cost:
    """Count what a training step on `example` costs.

    Args:
        example: inputs of the model, of the shape that was attached; the batch may be another.
        loss_fn: `loss_fn(output) -> scalar`. Default: the sum of all that the model returns.
        target: for rules that send targets or have local losses, as for `learner.target`. Default: class indices.

    A model that cannot run without values (a branch on a number, tensors that are no parameters or buffers) is counted
    with them, on a copy where it lives. Raises AttachError where that fails too, or something cannot be counted.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x = torch.randn(16, 4)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> cost = fb.count_cost(learner, x)
        >>> cost.steps
        1
        >>> cost.feedback_bytes  # two sites of eight features, three classes, four bytes each
        192
    """
    device = next(learner.model.parameters()).device
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = _faker(mode)
    try:
        return _Count(
            _without_values(learner, fake), tree_map(fake, example), loss_fn, target, mode
        ).cost()
    except (RuntimeError, NotImplementedError) as error:
        if device.type == "meta":
            raise AttachError(
                f"{type(learner.model).__name__} cannot run without values ({str(error).splitlines()[0]}): build it on a device that "
                "has them, for example the CPU."
            ) from error
    here = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, example)
    return _Count(copy.deepcopy(learner), here, loss_fn, target, nullcontext()).cost()


class _Count:
    """Runs the steps of a copy of the learner, which it may change."""

    def __init__(
        self,
        learner: Learner,
        inputs: Any,
        loss_fn: LossFn | None,
        target: Tensor | None,
        mode: AbstractContextManager[Any],
    ) -> None:
        self.learner, self.inputs, self.loss_fn, self.mode = learner, inputs, loss_fn or _sum, mode
        self.reference = next(p for p in learner.model.parameters() if p.is_floating_point())
        self.batch = len(next(t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()))
        self.target = self._classes() if target is None else target.to(self.reference.device)
        segments = zip(learner.graph.sites, learner.plan.segments, strict=True)
        trained = {site for site, segment in segments if segment.parameters}
        self.edges = [edge for edge in learner.graph.edges if edge.site in trained]
        self.steps = 0

    def cost(self) -> Cost:
        learner = self.learner
        with _unfused(), torch.enable_grad(), training_mode(learner.model):
            joint, held = self._step("joint")
            runs = {"joint": (joint, held)} | {s: self._if_allowed(s) for s in OTHERS}
            feedback, learning = self._feedback(joint)
            phase = self._phase()
        own = feedback + learning
        kinds = ("forward", "weight_gradients", "input_gradients", "auxiliary")
        return Cost(
            rule=learner.rule.label,
            model=type(learner.model).__name__,
            batch=self.batch,
            **{kind: joint.total(kind) for kind in kinds},
            feedback=feedback,
            learning=learning,
            phase=phase,
            steps=self.steps,
            feedback_bytes=learner.feedback_bytes,
            traffic_bytes=sum(self._message(edge).nbytes for edge in self.edges),
            signal_bytes=sum(self._zeros(edge, edge.site_shape).nbytes for edge in self.edges),
            held={s: run and run[1] for s, run in runs.items()},
            totals={
                s: run and own + sum(run[0].total(kind) for kind in kinds)
                for s, run in runs.items()
            },
            layers=_layers(joint, kinds[:3]),
        )

    def _step(self, schedule: Schedule) -> tuple[Products, int]:
        """The products of one step, and the most bytes that it held."""
        learner = self.learner
        saved = Saved((*learner.parameters(), *learner.buffers()))
        products = Products(learner.model, learner.feedback, self.inputs)

        def loss_fn(output: Any) -> Tensor:
            loss = self.loss_fn(output)
            if schedule == "joint":
                branches = learner.graph.branches
                sweeps = branches.sweeps if branches else 0
                self.steps = _in_sequence(loss, products, learner.attached.needs_error, sweeps)
            return loss

        learner.target(self.target)
        with self._watched(products, saved), self.mode, products, saved.hooks():
            learner.backward(self.inputs, loss_fn, schedule)
        return products, saved.peak

    @contextmanager
    def _watched(self, products: Products, saved: Saved) -> Iterator[None]:
        """Follow what the cuts do within a pass as well: this learner is a copy, whose methods may be replaced."""
        cuts: Any = self.learner.attached.cuts
        methods = (
            (cuts, "broadcast", saved.within(cuts.broadcast)),
            (cuts, "local_loss", saved.within(cuts.local_loss)),
            (cuts.upward, "hang", products.as_feedback(cuts.upward.hang)),
        )
        for owner, name, method in methods:
            vars(owner)[name] = method
        try:
            yield
        finally:
            for owner, name, _ in methods:
                delattr(owner, name)

    def _if_allowed(self, schedule: Schedule) -> tuple[Products, int] | None:
        try:
            if schedule == "replay":
                self._step(schedule)  # the first one rehearses
            return self._step(schedule)
        except FeedbackError:
            return None

    def _feedback(self, joint: Products) -> tuple[int, int]:
        """MACs of the signals, and of the feedback weights' gradients.

        An operator says what it multiplies, for some gather and add instead; what else a rule's messages multiply was seen.
        """
        signals = learning = seen = 0
        for edge in self.edges:
            h = self._zeros(edge, edge.site_shape)
            weights = self._weights(edge)
            message = self._message(edge)
            ends = edge.source_shape, edge.site_shape
            declared = edge.operator.macs(*ends) * len(h) + edge.operator.macs_per_pass(*ends)
            sent = self._count(lambda: edge.operator.send(weights, message, edge.site_shape))  # noqa: B023
            signals += declared
            seen += sent
            if edge.learns_in_pass:
                made = self._count(partial(edge.rule.feedback_grad, edge, weights, message, h))
                learning += made if made or sent else declared
                seen += made
        return signals + joint.total("feedback") - seen, learning + joint.total("learning")

    def _count(self, call: Callable[[], Any]) -> int:
        with self.mode, torch.no_grad(), Products(self.learner.model, nn.Module(), ()) as products:
            call()
        return products.total("forward")

    def _phase(self) -> int | None:
        if not self.learner.attached.in_phase:
            return None
        with Products(self.learner.model, nn.Module(), self.inputs) as products:
            self.learner.feedback_step(self.inputs, self.loss_fn)
        return sum(products.macs.values())

    def _weights(self, edge: Edge) -> tuple[Tensor, ...]:
        own = self.learner.weights_of(edge)
        return (
            (*own, self.learner.model.get_parameter(edge.forward_weight))
            if edge.forward_weight
            else own
        )

    def _message(self, edge: Edge) -> Tensor:
        """What travels along an edge."""
        d = self._zeros(edge, edge.source_shape)
        return edge.rule.message(edge, d, d, d)

    def _zeros(self, edge: Edge, shape: Sequence[int]) -> Tensor:
        lead = edge.leading + edge.repeats - 1
        return self.reference.new_zeros(self.batch, *edge.site.shape[:lead], *shape).flatten(
            0, lead
        )

    def _classes(self) -> Tensor:
        source = self.learner.source
        rest = source.shape[:-1] if source.tokens else source.shape[1:]
        return torch.zeros(self.batch, *rest, dtype=torch.long, device=self.reference.device)


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention and recurrent layers in single products: within a fused kernel they are not seen."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of builds for other processors
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


def _in_sequence(loss: Tensor, products: Products, needs_error: bool, sweeps: int) -> int:
    """The most products on a way through autograd's graph, from the loss to a layer's output.

    An edge of the feedback graph is one, whatever its operator does within; what starts from a target or a local loss waits
    for nothing. No way leads through the inputs of more than `sweeps` residual branches.
    """

    def onward(node: Any) -> list[tuple[Any, int]]:
        children = [child for child, _ in node.next_functions]
        broadcast = isinstance(node, BROADCAST)
        if isinstance(node, JOIN) or (broadcast and not needs_error):
            return [(child, 0) for child in children[:1] if child is not None]
        if broadcast:
            return [(child, int(i > 0)) for i, child in enumerate(children) if child is not None]
        product = node._sequence_nr() in products.products
        return [
            (child, int(product and not products.made_of_weights(child)))
            for child in children
            if child is not None
        ]

    # by the branches passed on the way
    depth = {(loss.grad_fn, 0): 0}
    for node in walk([loss.grad_fn], lambda node: [child for child, _ in onward(node)]):
        for passed in range(sweeps + 1):
            if (node, passed) not in depth:
                continue
            for child, more in onward(node):
                there = (child, passed + isinstance(child, DEFER))
                if there[1] <= sweeps:
                    depth[there] = max(depth.get(there, 0), depth[node, passed] + more)
    return max(depth.values())


def _faker(mode: FakeTensorMode) -> Callable[[Any], Any]:
    """A function that gives a tensor's likeness on the CPU, without values; other things as they are."""

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        with mode:
            return torch.empty_like(leaf, device="cpu", requires_grad=False)

    return fake


def _without_values(learner: Learner, fake: Callable[[Any], Any]) -> Learner:
    """A copy whose parameters and buffers have shapes only."""
    known: dict[int, Any] = {
        id(p): nn.Parameter(fake(p), p.requires_grad) for p in learner.parameters()
    }
    known |= {id(b): fake(b) for b in learner.buffers()}
    return copy.deepcopy(learner, known)


def _sum(output: Any) -> Tensor:
    found = [
        t.sum() for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()
    ]
    return torch.stack(found).sum() if len(found) > 1 else found[0]


def _layers(products: Products, kinds: Sequence[str]) -> dict[str, dict[str, int]]:
    names = dict.fromkeys(layer for kind, layer in products.macs if kind in kinds)
    return {name: {kind: products.macs[kind, name] for kind in kinds} for name in names}
