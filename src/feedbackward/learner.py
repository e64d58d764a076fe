"""`attach` and the `Learner`: a model that is trained by a rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from feedbackward.activity import Site, Source
from feedbackward.engine.attached import (
    Attached,
    AttachedModule,
)
from feedbackward.engine.checks import check_graph
from feedbackward.engine.cuts import Cuts
from feedbackward.engine.description import describe, describe_html
from feedbackward.engine.in_place import InPlace
from feedbackward.engine.outside import (
    averaged,
    check_reduce,
    holds_fsdp,
    is_recorded,
    refuse_left_out,
    refuse_shards,
)
from feedbackward.engine.phase import Phase
from feedbackward.engine.plan import Plan, make_plan
from feedbackward.engine.rows import Activities
from feedbackward.engine.target import Target
from feedbackward.engine.transparent import Transparent, borrowed, refuse_script
from feedbackward.engine.weights import fitted, make_feedback, weight_names
from feedbackward.errors import AttachError, FeedbackError
from feedbackward.graph import Edge, Graph
from feedbackward.model.example import run
from feedbackward.operators.base import Weights
from feedbackward.rule import Rule
from feedbackward.schedules.dsp import DSP, check_delayed
from feedbackward.schedules.joint import Schedule, backward, check_schedule
from feedbackward.schedules.passes import LossFn

M = TypeVar("M", bound=nn.Module)


class Learner(AttachedModule, Generic[M]):
    """A model that a rule trains. Call it like the model; `loss.backward()` and the optimizer stay as they are.

    Attributes:
        model: the user's model, unchanged. What it has and the learner has not (`learner.config`) is found through the learner,
            and its own methods train by the rule when they are called so.
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
        model: M,
        rule: Rule,
        sites: tuple[Site, ...],
        source: Source,
        seed: int,
        feedback_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model: M = model
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
        self._in_place: InPlace | None = None
        self._install()

    def _install(self) -> None:
        handles = self.attached.cuts.install(self.model)
        self.attached.handles = handles + (self._in_place.install() if self._in_place else [])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a learner has hooks of its own: those of its model did not come along."""
        super().__setstate__(state)
        if not self._detached:
            for handle in self.attached.handles:
                handle.remove()
            self._install()

    def __getattr__(self, name: str) -> Any:
        """What the model has, where a learner has nothing of this name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            # an error within an attribute of the class must not become an answer of the model
            own = hasattr(type(self), name) or (name.startswith("__") and name.endswith("__"))
            if model is None or own:
                raise
        return borrowed(model, name, self._training_in_place)

    @contextmanager
    def _training_in_place(self) -> Iterator[None]:
        """The model itself trains by the rule within this context."""
        if self._in_place or self._detached:
            yield
            return
        handles = InPlace(self.attached, self._begin).install()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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

    @property
    def trains_in_place(self) -> bool:
        """Whether the model itself trains by the rule, whoever calls it."""
        return self._in_place is not None and not self._detached

    @Transparent
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output. If gradients are on, the rule's cuts and broadcasts are in place.

        Raises SiteError if the pass differs from the example's, and AttachError for inputs that require gradients.
        """
        self._refuse_detached()
        given = self._begin()
        if given is None:
            return self.model(*args, **kwargs)
        if not torch.compiler.is_compiling():
            refuse_left_out(self, self.model, self.feedback)
        eager = self.graph.upward or self.graph.branches
        way = self._uncompiled if eager else self.attached.run
        return way(args, kwargs, *given)

    def _begin(self) -> tuple[Target | None] | None:
        """The targets of a pass that begins now; None if it is a plain one."""
        target, grad = self._take_target(), torch.is_grad_enabled()
        cut = not self._exact and grad and bool(self.graph.sites)
        cut = cut and not is_recorded(self.model.training)
        if grad:
            self.attached.cuts.recompute = cut
            if not self._exact and isinstance(self.rule, DSP):
                check_delayed(self, self.rule.label)
        return (target,) if cut else None

    def _take_target(self) -> Target | None:
        """The targets of the next pass, whatever pass that is."""
        target = self._target
        if target is not None:
            # a module's attributes are slow to set
            self._target = None
        return target

    def _hook_root(self) -> None:
        self._in_place = InPlace(self.attached, self._begin)
        self.attached.handles += self._in_place.install()

    def _uncompiled(self, *given: Any) -> Any:
        """Run a pass uncompiled: its backward pass runs others (signals that go up, highways), which no compiler supports."""
        # a decorator would import torch._dynamo together with this file, which takes seconds
        return torch.compiler.disable(self.attached.run)(*given)

    def backward(
        self,
        inputs: Any,
        loss_fn: LossFn,
        schedule: Schedule = "joint",
        keep_inputs: bool = False,
        reduce: bool | None = None,
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
            reduce: on several processes, whether the gradients of this call are averaged over all of them, as
                DistributedDataParallel does; it must be said there. Every process must make the same calls.

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
        own = list(self.parameters())
        if not holds_fsdp(self) and check_reduce(reduce, own):
            with averaged(own):
                return self._backward(inputs, loss_fn, schedule, keep_inputs)
        return self._backward(inputs, loss_fn, schedule, keep_inputs)

    def _backward(
        self, inputs: Any, loss_fn: LossFn, schedule: Schedule, keep_inputs: bool
    ) -> Tensor:
        if schedule == "joint":
            loss = loss_fn(run(self, inputs))
            loss.backward()
            return loss.detach()
        refuse_shards(
            self.parameters(),
            f'{schedule} runs parts of the model by themselves: use schedule="joint"',
        )
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
        refuse_shards(
            self.parameters(),
            "the phase of the feedback runs the model by itself: use DistributedDataParallel",
        )
        self.attached.follow_changes(inputs)
        self.attached.without_phase = None
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
            y: class indices `[N]` (`[N, T]` for tokens, `[N, H, W]` for maps), or targets of the output's own shape. Give -100
                where the loss leaves a row out (padding, a mask): otherwise its label would be learned from.
            scale: a factor on the signals of the pass. They do not come from the loss, so a factor on the loss (1/k for k
                accumulated batches) must be given here as well.
        """
        self._target = Target(y, scale)

    def to_empty(self, *, device: Any, recurse: bool = True) -> Learner[M]:
        """As that of every module; but the feedback gets the values of its seed, and not whatever is in memory."""
        drawn = self.feedback.on_meta()
        # refused before anything is lost
        self.feedback.drawn_on("meta")
        super().to_empty(device=device, recurse=recurse)
        if not drawn:
            self.feedback.draw()
        return self

    def __prepare_scriptable__(self) -> Learner:
        refuse_script()

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

    def detach(self) -> M:
        """Remove every hook and return the plain model. The learner cannot be used any more."""
        for handle in self.attached.handles:
            handle.remove()
        self.attached.handles.clear()
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

    def _repr_html_(self) -> str:
        return describe_html(self.attached)

    def _see_rows(self, tensors: Activities, example: Any) -> None:
        try:
            self.attached.rows.see(tensors, self.model, example)
        except Exception:
            self.detach()
            raise

    def _make_plan(self, example: Any) -> None:
        try:
            cuts = self.attached.cuts
            self.attached.whole_plan = make_plan(cuts, self.sites, example)
            # a frozen layer does not send its signal on, which is refused here
            if self.graph.upward:
                make_plan(cuts, self.sites, example, whole=False)
        except Exception:
            self.detach()
            raise
