"""`attach` and the `Learner`: a model that is trained by a rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from feedbackward.engine.attached import (
    Attached,
    AttachedModule,
    refuse_input_gradients,
    refuse_wrapped,
)
from feedbackward.engine.checks import check_graph
from feedbackward.engine.cuts import Cuts
from feedbackward.engine.description import describe, in_bytes
from feedbackward.engine.in_place import InPlace
from feedbackward.engine.phase import Phase
from feedbackward.engine.plan import Plan, make_plan
from feedbackward.engine.rows import Activities
from feedbackward.engine.target import Target
from feedbackward.engine.weights import count_bytes, fitted, make_feedback, weight_names
from feedbackward.errors import AttachError, FeedbackError
from feedbackward.graph import Edge, Graph, LayerInput, Site, Source
from feedbackward.model.example import run
from feedbackward.model.layers import find_layer_inputs
from feedbackward.model.sites import Sites, find_sites, find_source, refuse_unrecorded
from feedbackward.model.trace import trace
from feedbackward.operators import OPERATORS
from feedbackward.operators.base import Weights, within
from feedbackward.rule import Rule
from feedbackward.schedules.dsp import DSP, check_delayed
from feedbackward.schedules.joint import Schedule, backward, check_schedule
from feedbackward.schedules.passes import LossFn


def attach(
    model: nn.Module,
    rule: Rule,
    *,
    example: Any,
    sites: Sites = "layers",
    error_at: str | None = None,
    output: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    feedback_dtype: torch.dtype | None = None,
    in_place: bool = False,
) -> Learner:
    """Train `model` with `rule`: find the sites, make the feedback weights, and return the Learner.

    The model keeps its class, its parameters and the keys of its `state_dict`. `learner(x)` returns the same outputs, bit for
    bit. `loss.backward()` on them sends the error along the rule's feedback graph instead of down through the layers.

    Args:
        model: any module whose first dimension is the batch.
        rule: a rule instance, for example `DKP()`.
        example: inputs that the model accepts (a tensor, a tuple of arguments or a dict of keywords), of the shape used in
            training. The model runs on them twice, in training mode; buffers, modes and random state are restored.
        sites: where the network is cut. `"layers"`: the activity that enters each Linear layer or convolution after the
            first. `"every-2"`: every second of these, from the last one down (also 3, ...). `"stages"`: the last of each
            height and width. `"blocks"`: the outputs of residual or transformer blocks. Or a list of module names, whose
            outputs are taken, or a function `(name, module) -> bool`. For chains (FA, KP) the sites are the inputs of layers,
            and names are names of layers.
        error_at: the module whose output's error is sent. Layers above it learn by their true gradient. Default: the
            model's output.
        output: a function that takes the output tensor from a structured output, for example `lambda o: o.logits`.
        seed: feedback weights depend on it and on the site's name only, so they are the same on every rank and device.
        feedback_dtype: the dtype of stored feedback weights: float32 by default, float64 for a float64 model.
            `torch.bfloat16` halves their bytes, but learning loses updates smaller than 1/256 of a weight.
        in_place: whether the model itself trains by the rule, whoever calls it, until `learner.detach()`. It is for tools that
            want the model and not a wrapper; `fb.param_groups(learner)` has the parameters for their optimizer.

    Raises:
        AttachError: the model, the example and the sites do not fit together.
        SiteError: a named site is unknown, is called twice, or lies above the source.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DKP(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> [site.name for site in learner.sites]
        ['1', '3']
    """
    if not isinstance(rule, Rule):
        hint = f"{rule.__name__}()" if isinstance(rule, type) else "fb.DKP()"
        raise AttachError(
            f"the rule must be an instance of a Rule, for example {hint}, not {rule!r}."
        )
    refuse_wrapped(model)
    refuse_input_gradients(example)
    recorded = trace(model, example)
    refuse_unrecorded(recorded)
    source = find_source(model, recorded, error_at, output)
    find = find_layer_inputs if issubclass(rule.feeds, LayerInput) else find_sites
    found = find(model, recorded, sites, source)
    if not found:
        raise AttachError(
            f"{type(model).__name__} has no activity to feed between its first Linear or convolution and the source "
            f"{source.name!r}: a network without hidden layers has nothing to send the error to. For layers of other kinds "
            'use sites="blocks" or name the sites; or choose a later error_at.'
        )
    learner = Learner(model, rule, tuple(found), source, seed, feedback_dtype)
    tensors = learner.attached.rows.tensors(recorded)
    # the graph of the pass is kept by these alone
    del recorded
    learner._see_rows(tensors)
    del tensors
    learner = learner._with_plan(example)
    if in_place:
        learner._hook_root()
    return learner


class Learner(AttachedModule):
    """A model that a rule trains. Call it like the model; `loss.backward()` and the optimizer stay as they are.

    Attributes:
        model: the user's model, unchanged.
        feedback: the feedback weights of every edge (Parameters if the rule learns them, otherwise buffers), and the
            auxiliary networks of local losses.
        attached: the record that the engine works on. `rule`, `graph`, `source`, `sites` and `plan` are its own.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DKP(), example=x)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> torch.equal(learner(x), model(x))  # the outputs are the model's own
        True
        >>> learner.detach() is model
        True
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        sites: tuple[Site, ...],
        source: Source,
        seed: int,
        feedback_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        graph = fitted(rule.connect(sites, source), seed)
        check_graph(model, rule, graph)
        self.feedback = make_feedback(model, graph, seed, feedback_dtype)
        cuts = Cuts(model, graph, self.feedback)
        self.attached = Attached(model, rule, sites, source, graph, self.feedback, cuts)
        # DistributedDataParallel would wait for their gradients in every backward pass
        self._ddp_params_and_buffers_to_ignore = self._learned_in_phase()
        self._exact = False
        self._target: Target | None = None
        self._detached = False
        self._handles = cuts.install(model)

    @property
    def rule(self) -> Rule:
        """The rule as it was given to `attach`."""
        return self.attached.rule

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that were found."""
        return self.attached.sites

    @property
    def source(self) -> Source:
        """The activity whose error is sent to the sites."""
        return self.attached.source

    @property
    def graph(self) -> Graph:
        """What is cut, and what is sent where."""
        return self.attached.graph

    @property
    def plan(self) -> Plan:
        """Which parameters each segment trains, of those that train now."""
        return self.attached.plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output. If gradients are on, the rule's cuts and broadcasts are in place.

        Raises SiteError if the pass differs from the example's, and AttachError for inputs that require gradients.
        """
        self._refuse_detached()
        given = self._begin()
        if given is None:
            return self.model(*args, **kwargs)
        eager = self.graph.upward or self.graph.branches
        way = self._uncompiled if eager else self.attached.run
        return way(args, kwargs, *given)

    def _begin(self) -> tuple[Target | None] | None:
        """The targets of a pass that begins now; None if it is a plain one."""
        target, grad = self._take_target(), torch.is_grad_enabled()
        cut = not self._exact and grad and bool(self.graph.sites)
        if grad:
            self.attached.cuts.recompute = cut
            if not self._exact and isinstance(self.rule, DSP):
                check_delayed(self, self.rule.label)
        return (target,) if cut else None

    def _take_target(self) -> Target | None:
        """The targets of the next pass, whatever pass that is."""
        target, self._target = self._target, None
        return target

    def _hook_root(self) -> None:
        self._handles += InPlace(self.attached, self._begin).install()

    def _uncompiled(self, *given: Any) -> Any:
        """Run a pass uncompiled: its backward pass runs others (signals that go up, highways), which no compiler supports."""
        # a decorator would import torch._dynamo together with this file, which takes seconds
        return torch.compiler.disable(self.attached.run)(*given)

    def backward(
        self, inputs: Any, loss_fn: LossFn, schedule: Schedule = "joint", keep_inputs: bool = False
    ) -> Tensor:
        """Run the forward and backward passes of a batch, and return the loss. Gradients add to `.grad`.

        Args:
            inputs: the model's inputs: a tensor, a tuple of arguments or a dict of keywords.
            loss_fn: `loss_fn(output) -> scalar`, for example `lambda out: F.cross_entropy(out, y)`. It may be called several
                times. With a gradient scaler: `lambda out: scaler.scale(...)`.
            schedule: `"joint"` does what `loss_fn(learner(inputs)).backward()` does. `"replay"` holds one segment's activities
                at a time, for one more forward pass (and one for each relay that is not a site). `"eager"` takes one pass,
                for rules whose signals need no error. Gradients, batch statistics and dropout masks are those of `joint`.
            keep_inputs: for `replay`: keep every site's activity, so that each segment runs by itself, the last one first,
                and relays need no pass. The sites' activities and one segment are in memory.

        Raises AttachError if the rule, overlapping segments or a forward pass that cannot be repeated do not allow the
        schedule, and SiteError as a forward pass does.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> import feedbackward as fb
            >>> x = torch.randn(16, 4)
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
            >>> learner = fb.attach(model, fb.DFA(), example=x)
            >>> loss = learner.backward(x, lambda output: output.square().mean(), schedule="replay")
            >>> all(p.grad is not None for p in model.parameters())
            True
        """
        self._refuse_detached()
        check_schedule(schedule, keep_inputs)
        if schedule == "joint":
            loss = loss_fn(run(self, inputs))
            loss.backward()
            return loss.detach()
        if self._exact:
            raise AttachError(
                f'within learner.exact() there are no segments to {schedule}: use schedule="joint".'
            )
        target = self._take_target()
        with self.attached.own_pass():
            return backward(self.attached, inputs, loss_fn, target, schedule, keep_inputs)

    def feedback_step(self, inputs: Any, loss_fn: LossFn | None = None) -> None:
        """Run the phase in which feedback learns, for rules that have one (weight mirror, decoders).

        It adds to the gradients of the feedback weights, and changes nothing of the model unless the rule `revises` its
        gradients (DKP-PC), which needs `loss_fn(output) -> scalar`. One number is drawn from torch's generator. Call it as often
        as the rule's docstring says, before the optimizer steps, and on every rank: the gradients are averaged. Raises
        FeedbackError for other rules, and under fp16 autocast, because no GradScaler may unscale these gradients.
        """
        self._refuse_detached()
        rules = self.attached.in_phase
        if not rules:
            raise FeedbackError(
                f"{self.rule.label} has no phase of its own for its feedback: leave out the call of feedback_step."
            )
        self.attached.refuse_fp16("feedback learns in a phase that no loss scale reaches")
        self.attached.follow_changes()
        phase = Phase(self.attached, inputs, loss_fn)
        alone = len(self.attached.rules) == 1
        for rule in rules:
            own = [edge for edge in phase.edges if edge.rule is rule]
            with self.attached.own_pass():
                rule.feedback_step(phase if alone else phase.part(own))

    def _learned_in_phase(self) -> list[str]:
        """The names of feedback weights that only `feedback_step` gives gradients."""
        edges = [e for e in self.graph.edges if e.shares is None and not e.learns_in_pass]
        names = {name for edge in edges for name in weight_names(edge)}
        return [f"feedback.{name}" for name, _ in self.feedback.named_parameters() if name in names]

    def _refuse_detached(self) -> None:
        if self._detached:
            raise AttachError("this learner was detached; attach the model again.")

    def target(self, y: Tensor, scale: float = 1.0) -> None:
        """Set the targets of the next forward pass, for rules that send targets (DRTP) or have local losses (DGL).

        Args:
            y: class indices `[N]` (`[N, T]` for tokens, `[N, H, W]` for maps), or targets of the output's own shape.
            scale: a factor on the signals of the pass. They do not come from the loss, so a factor on the loss (1/k for k
                accumulated batches) must be given here as well.
        """
        self._target = Target(y, scale)

    def _replicate_for_data_parallel(self) -> Learner:
        raise AttachError(
            "nn.DataParallel runs replicas in threads, which share one tape: use DistributedDataParallel."
        )

    @contextmanager
    def exact(self) -> Iterator[None]:
        """A context in which forward passes are plain, so that their backward pass is exact backpropagation."""
        before, self._exact = self._exact, True
        try:
            yield
        finally:
            self._exact = before

    def detach(self) -> nn.Module:
        """Remove every hook and return the plain model. The learner cannot be used any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._detached = True
        return self.model

    def feedback_of(self, edge: Edge) -> Tensor:
        """The feedback weights of an edge. If they are several tensors (values and indices, factors), the first."""
        return self.weights_of(edge)[0]

    def weights_of(self, edge: Edge) -> Weights:
        """All tensors of an edge, in the order of its operator's `parts`. Seeded feedback has none."""
        return self.attached.weights_of(edge)

    @property
    def feedback_bytes(self) -> int:
        """Bytes of all feedback weights."""
        return self.attached.feedback_bytes

    def __str__(self) -> str:
        return describe(self.attached)

    def _see_rows(self, tensors: Activities) -> None:
        try:
            self.attached.rows.see(tensors)
        except Exception:
            self.detach()
            raise

    def _with_plan(self, example: Any) -> Learner:
        try:
            cuts = self.attached.cuts
            self.attached.whole_plan = make_plan(cuts, self.sites, example)
            # a frozen layer does not send its signal on, which is refused here
            if self.graph.upward:
                make_plan(cuts, self.sites, example, whole=False)
        except Exception:
            self.detach()
            raise
        if self.plan.unreached:
            names = ", ".join(self.plan.unreached)
            warnings.warn(
                f"no segment trains these parameters: {names}. Freeze them, or choose other sites.",
                stacklevel=3,
            )
        self._warn_of_size()
        return self

    def _warn_of_size(self) -> None:
        """Warn if feedback whose form the user chooses is larger than the model."""
        chosen = {
            e.key: self.weights_of(e)
            for e in self.graph.edges
            if any(type(part) in OPERATORS.values() for part in within(e.operator))
            and not isinstance(e.site, LayerInput)
        }
        feedback = sum(count_bytes(weights) for weights in chosen.values())
        own = count_bytes(self.model.parameters())
        if feedback > own:
            warnings.warn(
                f"the feedback weights take {in_bytes(feedback)}, the model's own parameters {in_bytes(own)}. Smaller feedback: "
                "operator=fb.PerShape(maps=fb.Pooled(), vectors=fb.Dense()), fb.Sparse(1) or fb.LowRank(r).",
                stacklevel=4,
            )
