"""`attach` and the `Learner`: a model that is trained by a rule."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from .arcs import find_arcs
from .errors import AttachError
from .graph import Arc, Edge, Graph, Site, Source
from .plan import Plan, describe, make_plan
from .rules.base import Rule
from .seams import Seams
from .sites import Sites, find_sites, find_source, refuse_unrecorded
from .trace import trace


def attach(
    model: nn.Module,
    rule: Rule,
    *,
    example: Any,
    sites: Sites = "layers",
    error_at: str | None = None,
    output: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
) -> Learner:
    """Train `model` with `rule`: find the sites, make the feedback weights, and return the Learner.

    The model's class, parameters and `state_dict` keys stay as they are; `learner(x)` gives bit-identical outputs,
    and `loss.backward()` on them sends the error along the rule's feedback graph instead of through the layers.

    Args:
        model: any module whose first dimension is the batch.
        rule: a rule instance, for example `DKP()`.
        example: inputs the model accepts (a tensor, a tuple of arguments or a dict of keywords), of the shape used in
            training. The model runs on it twice, in training mode; buffers, modes and random state are restored.
        sites: `"layers"`: the activity that enters each Linear or convolution after the first (for chains, FA and KP: each
            such layer's input, and names are names of layers); `"blocks"`: outputs of
            residual or transformer blocks; a list of module names (their outputs); or a predicate `(name, module) -> bool`.
        error_at: the module whose output's error is broadcast; layers above it learn by their true gradient. Default:
            the model's output.
        output: which tensor of a structured output is the model's output, for example `lambda o: o.logits`.
        seed: feedback weights depend on it and on the site's name only, so they are the same on every rank and device.

    Raises:
        AttachError: the model, the example and the sites do not fit, naming the fix.
        SiteError: a named site is unknown, called twice, or beyond the source.
    """
    if not isinstance(rule, Rule):
        hint = f"{rule.__name__}()" if isinstance(rule, type) else "fb.DKP()"
        raise AttachError(f"the rule must be an instance of a Rule, for example {hint}, not {rule!r}.")
    _refuse_wrapped(model)
    _refuse_input_gradients(example)
    recorded = trace(model, example)
    refuse_unrecorded(recorded)
    source = find_source(model, recorded, error_at, output)
    find = find_arcs if issubclass(rule.feeds, Arc) else find_sites
    found = find(model, recorded, sites, source)
    if not found:
        raise AttachError(
            f"{type(model).__name__} has no activity to feed between its first Linear or convolution and the source "
            f"{source.name!r}: a network without hidden layers has nothing to send the error to. For layers of other kinds "
            'use sites="blocks" or name the sites; or choose a later error_at.'
        )
    del recorded
    return Learner(model, rule, tuple(found), source, seed)._with_plan(example)


class Learner(nn.Module):
    """A model that a rule trains. Call it like the model; `loss.backward()` and the optimizer stay as they are.

    Attributes:
        model: the user's model, unchanged.
        feedback: the feedback weights, one per edge: Parameters where the rule learns them, buffers where it does not.
        rule, graph, source, sites, plan: what is sent where, and which parameters each segment trains.
    """

    def __init__(
        self, model: nn.Module, rule: Rule, sites: tuple[Site, ...], source: Source, seed: int
    ) -> None:
        super().__init__()
        self.model = model
        self.rule, self.sites, self.source, self.seed = rule, sites, source, seed
        self.graph: Graph = rule.graph(sites, source)
        _check_graph(model, rule, self.graph)
        self.feedback = _make_feedback(model, self.graph, rule, seed)
        self.seams = Seams(self.graph, rule, self.feedback)
        self.plan: Plan
        self._exact = False
        self._detached = False
        self._handles = self.seams.install(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output; under gradients, with the rule's cuts and broadcasts in place.

        Raises SiteError where the pass does not match what was attached, AttachError for inputs that require gradients.
        """
        if self._detached:
            raise AttachError("this learner was detached; attach the model again.")
        cut = not self._exact and torch.is_grad_enabled() and bool(self.graph.sites)
        if torch.is_grad_enabled():
            self.seams.recompute = cut
        if not cut:
            return self.model(*args, **kwargs)
        _refuse_input_gradients((args, kwargs))
        with self.seams.recording():
            tied = self.seams.tied(self.model)
            return functional_call(self.model, tied, args, kwargs) if tied else self.model(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> Learner:
        raise AttachError(
            "nn.DataParallel runs replicas in threads, which share one tape: use DistributedDataParallel."
        )

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within this context forward passes are plain, so that their backward is exact backpropagation."""
        before, self._exact = self._exact, True
        try:
            yield
        finally:
            self._exact = before

    def detach(self) -> nn.Module:
        """Remove every hook and give the plain model back; the learner cannot be used any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._detached = True
        return self.model

    def feedback_of(self, edge: Edge) -> Tensor:
        """The feedback weights of an edge."""
        return getattr(self.feedback, edge.key)

    @property
    def feedback_bytes(self) -> int:
        """Bytes of all feedback weights."""
        return sum(
            t.numel() * t.element_size() for t in (*self.feedback.parameters(), *self.feedback.buffers())
        )

    def __str__(self) -> str:
        return describe(self)

    def _with_plan(self, example: Any) -> Learner:
        try:
            self.plan = make_plan(self, example)
        except Exception:
            self.detach()
            raise
        if self.plan.unreached:
            names = ", ".join(self.plan.unreached)
            warnings.warn(
                f"no segment trains these parameters: {names}. Freeze them, or choose other sites.",
                stacklevel=3,
            )
        return self


def _refuse_input_gradients(inputs: Any) -> None:
    if any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(inputs)):
        raise AttachError(
            "an input requires a gradient, but under cuts its gradient is not the true one. Use `with learner.exact():` "
            "for input gradients, or detach the input."
        )


def _refuse_wrapped(model: nn.Module) -> None:
    """Hooks must sit on plain modules: a compiled or scripted part would not see them, a Learner has its own."""
    if not isinstance(model, nn.Module):
        raise AttachError(f"the model must be a torch.nn.Module, not {type(model).__name__}.")
    if not any(p.is_floating_point() for p in model.parameters()):
        raise AttachError(
            f"{type(model).__name__} has no floating-point parameters, so there is nothing to train."
        )
    for name, module in model.named_modules():
        where = f"its part {name!r}" if name else "the model"
        if isinstance(module, Learner):
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
        if isinstance(module, torch.jit.ScriptModule):
            raise AttachError(
                f"{where} is a TorchScript module, whose inside cannot be cut: attach to the Python model."
            )


def param_groups(
    learner: Learner, model: dict[str, Any] | None = None, feedback: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Optimizer parameter groups for the network's weights and for the feedback weights.

    `model` and `feedback` are the groups' options, for example `model={"lr": 0.1}, feedback={"lr": 0.01}`. A rule without
    learned feedback gives one group.
    """
    groups = [{"params": list(learner.model.parameters()), **(model or {})}]
    learned = list(learner.feedback.parameters())
    return [*groups, {"params": learned, **(feedback or {})}] if learned else groups


def _check_graph(model: nn.Module, rule: Rule, graph: Graph) -> None:
    """A rule that cuts nothing is backprop; a weight that is shared must be one that the model really has."""
    if not graph.sites and not rule.properties.weight_transport:
        raise AttachError(
            f"{rule.label} cuts nothing here, so it would be plain backprop; its graph() must return sites."
        )
    for edge in graph.edges:
        if edge.shares is None:
            continue
        owner, _, leaf = edge.shares.rpartition(".")
        weight = model.get_submodule(owner)._parameters.get(leaf)
        if weight is None:
            raise AttachError(
                f"{rule.label} gives B the gradient of {edge.shares!r}, which is re-parametrised (weight norm, pruning, ...). Remove "
                "the parametrisation, or use FA or a rule with direct feedback."
            )
        uses = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
        if len(uses) > 1:
            raise AttachError(
                f"{rule.label} gives B the gradient of {edge.shares!r}, which is tied ({' and '.join(uses)}) and gets the sum of "
                "several. Untie the weights, or use FA or a rule with direct feedback."
            )


def _make_feedback(model: nn.Module, graph: Graph, rule: Rule, seed: int) -> nn.Module:
    """One weight per edge, on the model's device; float64 for a float64 model, else float32."""
    holder = nn.Module()
    reference = next(p for p in model.parameters() if p.is_floating_point())
    dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
    for edge in graph.edges:
        digest = hashlib.sha256(f"{seed}:{edge.key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        B = edge.operator.create(edge.source_size, edge.site_shape, generator).to(reference.device, dtype)
        if rule.learned:
            holder.register_parameter(edge.key, nn.Parameter(B))
        else:
            holder.register_buffer(edge.key, B)
    return holder
