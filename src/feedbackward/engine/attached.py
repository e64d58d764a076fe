"""`Attached`: a model and what a rule made for it. Every part of the engine works on this record."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from feedbackward.activity import Site, Source
from feedbackward.engine.cuts import Cuts
from feedbackward.engine.mirrored import Mirrored
from feedbackward.engine.outside import in_group, is_fsdp, refuse_shards, refuse_transforms
from feedbackward.engine.plan import Plan, make_plan
from feedbackward.engine.rows import Rows
from feedbackward.engine.structure import Structure
from feedbackward.engine.target import Target
from feedbackward.engine.transparent import FirstHook
from feedbackward.engine.weights import (
    Feedback,
    count_bytes,
    refuse_frozen_zeros,
    refuse_without_values,
    weight_named,
    weights_of,
)
from feedbackward.errors import AttachError, FeedbackError
from feedbackward.graph import Edge, Graph
from feedbackward.model.example import Given
from feedbackward.operators.base import Weights
from feedbackward.rule import Rule

# how many training passes may come before the first phase
PASSES_WITHOUT_PHASE = 20


@dataclass(eq=False)
class Attached:
    """A model under a rule.

    Attributes:
        model: the user's model, on which the hooks of `cuts` sit.
        rule, sites, source: as `attach` got or found them; `rule` is the whole network's, the edges carry their own.
        graph: what is cut, and what is sent where.
        rules: those of the edges and local losses; of a graph without any, the rule itself.
        feedback: the module that holds the feedback weights and auxiliary networks.
        cuts: the hooks of a pass.
        whole_plan: which parameters each segment holds, whether they train now or not.
        rows, structure, mirrored: whether the rows of the batch, the parts of the model and the weights that feedback began as
            are those that it stands for.
    """

    model: nn.Module
    rule: Rule
    sites: tuple[Site, ...]
    source: Source
    graph: Graph
    feedback: Feedback
    cuts: Cuts
    rules: tuple[Rule, ...] = field(init=False)
    whole_plan: Plan = field(init=False)
    rows: Rows = field(init=False)
    structure: Structure = field(init=False)
    mirrored: Mirrored = field(init=False)
    # how many passes run that nobody may cut but those who run them
    own_passes: int = field(init=False, default=0)
    # the hooks on the model, in the order in which they act
    handles: list[RemovableHandle] = field(init=False, default_factory=list)
    # the number of hooks that had ever been registered when the order was last made
    _hooks_seen: int = field(init=False, default=-1)
    # training passes before the first phase; None once there was one
    without_phase: int | None = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.rules = self.graph.rules or (self.rule,)
        self.rows = Rows(self.graph)
        self.structure = Structure(self.model, self.rule, self.graph)
        self.mirrored = Mirrored(self.model, self.feedback, self.graph)

    @property
    def plan(self) -> Plan:
        """Which parameters each segment trains, of those that train now."""
        trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}
        return self.whole_plan.among(trainable)

    @property
    def needs_error(self) -> bool:
        """Whether some signal is made from the output or its error."""
        return any(rule.needs_error for rule in self.rules)

    @property
    def needs_target(self) -> bool:
        """Whether some signal is made from targets."""
        return any(rule.needs == "target" for rule in self.rules)

    @property
    def in_phase(self) -> tuple[Rule, ...]:
        """The rules whose feedback learns in a phase of its own."""
        return tuple(rule for rule in self.rules if rule.in_phase)

    @property
    def learns_in_phase(self) -> bool:
        """Whether something waits for a phase: feedback that gets its gradient there alone, or the model's own weights."""
        if any(rule.revises for rule in self.in_phase):
            return True
        edges = [e for e in self.graph.edges if e.rule.in_phase]
        return any(w.requires_grad for edge in edges for w in self.weights_of(edge))

    @contextmanager
    def own_pass(self) -> Iterator[None]:
        """Passes of the model within this context are ours: a model that trains in place does not cut them."""
        self.own_passes += 1
        try:
            yield
        finally:
            self.own_passes -= 1

    def weights_of(self, edge: Edge) -> Weights:
        """All tensors of an edge, in the order of its operator's `parts`; none for seeded feedback."""
        return weights_of(self.feedback, edge)

    @property
    def feedback_bytes(self) -> int:
        """Bytes of all feedback weights."""
        return count_bytes((*self.feedback.parameters(), *self.feedback.buffers()))

    def begin_pass(self, inputs: Any, target: Target | None) -> None:
        """Check what a pass under cuts is given, and renew the feedback that is drawn anew for every pass."""
        refuse_input_gradients(inputs)
        if target is None and self.needs_target:
            raise FeedbackError(
                f"{self.rule.label} needs the targets before the forward pass: call `learner.target(y)` before `learner(x)`."
            )
        if not all(rule.linear for rule in self.rules):
            self.refuse_fp16("signals or feedback gradients do not scale with the loss")
        self.follow_changes(inputs)
        self._refuse_shards()
        if not torch.compiler.is_compiling():
            refuse_transforms(inputs, self._beside_the_graph)
            self.mirrored.warn()
            self._count_pass()
            if self.rows.to_see:
                with self.own_pass():
                    self.rows.see_again(self.model, inputs)
        refuse_without_values(self.feedback, self.model)
        refuse_frozen_zeros(self.feedback, self.graph)
        self.cuts.recompute = True
        self.cuts.renew()

    @functools.cached_property
    def _beside_the_graph(self) -> str:
        """What the rule does in a pass that no transform of functions can follow, in words; empty for most."""
        if self.graph.branches is not None:
            return f"{self.rule.label}, whose signals are swept through the graph several times"
        if self.graph.upward:
            return f"{self.rule.label}, whose signals go upwards"
        renewed = any(edge.operator.renewed for edge in self.graph.edges)
        return f"{self.rule.label}, which draws feedback anew in every pass" if renewed else ""

    def follow_changes(self, inputs: Any) -> None:
        """Take note of modules that were changed since the last pass, or refuse them. `inputs`: those of the next pass."""
        if torch.compiler.is_compiling():
            return
        if not self.structure.unchanged():
            self.structure.judge(self.model)
            known = set(self.whole_plan.unreached)
            self.whole_plan = self.whole_plan.renamed(self.model)
            if not known.issuperset(self.whole_plan.unreached):
                # what was added has no neighbours that tell its place
                with self.own_pass():
                    self.whole_plan = make_plan(self.cuts, self.sites, inputs)
        self._come_last()

    def _come_last(self) -> None:
        """Act after hooks that were added later: what these make of an activity is cut, as if attached anew.

        FSDP's must see the output of a module, not what is cut from it.
        """
        if self._hooks_seen == RemovableHandle.next_id:
            # no hook was registered anywhere
            return
        self._hooks_seen = RemovableHandle.next_id
        for handle in self.handles:
            hooks = handle.hooks_dict_ref()
            if hooks is not None and not isinstance(hooks.get(handle.id), FirstHook):
                hooks.move_to_end(handle.id)

    def _refuse_shards(self) -> None:
        """Refuse a graph that needs weights which are whole only while their own module runs."""
        if not in_group():
            # a shard is held by a group of processes
            return
        names = {n for e in self.graph.edges for n in (e.shares, e.forward_weight) if n}
        refuse_shards(
            (weight_named(self.model, name) for name in names),
            f"{self.rule.label}'s feedback follows the weights of the layers, which are whole only while their own module runs: "
            "shard the learner as one (`fully_shard(learner)` alone), or use a rule with direct feedback (DFA, DKP)",
        )

    def _count_pass(self) -> None:
        """Warn, once, if feedback that learns in a phase is never given one."""
        if self.without_phase is None:
            return
        self.without_phase += 1
        if self.without_phase == PASSES_WITHOUT_PHASE and self.learns_in_phase:
            warnings.warn(
                f"{self.rule.label} learns in a phase of its own, and {self.without_phase} training passes ran without "
                "one: what learns there stays as it began. Call `learner.feedback_step(x)` before `optimizer.step()`, "
                "or freeze the feedback.",
                stacklevel=5,
            )

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Target | None) -> Any:
        """A forward pass under cuts; returns the model's output."""
        self.begin_pass(Given(args, kwargs), target)
        with self.cuts.recording(target):
            tied = self.cuts.tied()
            if tied:
                return self._run_tied(tied, args, kwargs)
            return self.model(*args, **kwargs)

    def _run_tied(
        self, tied: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return functional_call(self.model, tied, args, kwargs)
        except RuntimeError as error:
            if "requires_grad flags of leaf" not in str(error):
                raise
            raise FeedbackError(
                f"the forward pass freezes or unfreezes a layer whose gradient {self.rule.label} shares with its feedback, and within "
                "the pass it is too late for that: call `requires_grad_` before `learner(x)`, or use a rule with direct feedback "
                "(DFA, DKP)."
            ) from error

    def refuse_fp16(self, why: str) -> None:
        """Refuse a pass under fp16 autocast, whose loss scale does not reach all that the rule sends."""
        for kind in ("cuda", "cpu"):
            if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
                raise FeedbackError(
                    f"{self.rule.label}'s {why}, so a GradScaler would shrink them: use bf16, which needs none, or float32."
                )


class AttachedModule(nn.Module):
    """A module that holds an attached model: what schedules ask of a `Learner`."""

    attached: Attached


def refuse_input_gradients(inputs: Any) -> None:
    """Under cuts the gradient of an input is not the true one."""
    leaves: Any = tree_leaves(inputs) if not isinstance(inputs, Given) else inputs.leaves()
    if any(isinstance(t, Tensor) and t.requires_grad for t in leaves):
        raise AttachError(
            "an input requires a gradient, but under cuts its gradient is not the true one. Use `with learner.exact():` "
            "for input gradients, or detach the input."
        )


def refuse_wrapped(model: nn.Module) -> None:
    """Hooks must sit on plain modules: a compiled or scripted part would not see them, a Learner has its own."""
    if not isinstance(model, nn.Module):
        raise AttachError(f"the model must be a torch.nn.Module, not {type(model).__name__}.")
    if not any(p.is_floating_point() for p in model.parameters()):
        raise AttachError(
            f"{type(model).__name__} has no floating-point parameters, so there is nothing to train."
        )
    for name, module in model.named_modules():
        where = f"its part {name!r}" if name else "the model"
        if isinstance(module, AttachedModule):
            raise AttachError(
                f"{where} is a Learner already: attach to the plain model that `learner.detach()` gives back."
            )
        if hasattr(module, "_orig_mod"):  # what torch.compile returns
            raise AttachError(
                f"{where} is compiled: attach to the plain model, then `torch.compile(learner)`."
            )
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise AttachError(
                f"{where} is a {type(module).__name__}, which would not keep the feedback in step: attach to the plain "
                "model, then wrap the learner in DistributedDataParallel."
            )
        if is_fsdp(module):
            raise AttachError(
                f"{where} is sharded by FSDP already, which would leave the feedback out: attach to the plain model first, then "
                "`fully_shard` its blocks, and `fully_shard(learner)` last."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise AttachError(
                f"{where} is a TorchScript module, whose inside cannot be cut: attach to the Python model."
            )
