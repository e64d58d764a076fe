"""`attach`: from a model, a rule and an example to a `Learner`."""

from __future__ import annotations

import contextlib
import difflib
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from feedbackward.activity import LayerInput, ModelInput, PreActivation, Site, SiteInContext, Source
from feedbackward.engine.attached import refuse_input_gradients, refuse_wrapped
from feedbackward.engine.in_place import refuse_other_learners
from feedbackward.engine.size import in_bytes, smaller
from feedbackward.engine.weights import count_bytes
from feedbackward.errors import AttachError, FeedbackError
from feedbackward.learner import Learner, M
from feedbackward.model.context import find_in_context
from feedbackward.model.layers import find_layer_inputs
from feedbackward.model.sites import (
    Sites,
    find_input,
    find_pre_activations,
    find_sites,
    refuse_unrecorded,
)
from feedbackward.model.source import below_wide_head, find_source
from feedbackward.model.trace import Trace, trace
from feedbackward.operators import OPERATORS
from feedbackward.operators.base import within
from feedbackward.rule import Rule
from feedbackward.rules import RULES

# feedback of fewer bytes is not worth a warning, however small the model is
LARGE = 64 * 2**20

# how the places of each kind that a rule feeds are found
FINDERS: dict[type[Site], Callable[[nn.Module, Trace, Sites, Source], Sequence[Site]]] = {
    Site: find_sites,
    LayerInput: find_layer_inputs,
    SiteInContext: find_in_context,
    PreActivation: find_pre_activations,
    ModelInput: find_input,
}


def attach(
    model: M,
    rule: Rule | str,
    *,
    example: Any,
    sites: Sites = "layers",
    error_at: str | None = None,
    output: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    feedback_dtype: torch.dtype | None = None,
    in_place: bool = False,
) -> Learner[M]:
    """Train `model` with `rule`: find the sites, make the feedback weights, and return the Learner.

    The model keeps its class, its parameters and the keys of its `state_dict`. `learner(x)` returns the same outputs, bit for
    bit. `loss.backward()` on them sends the error along the rule's feedback graph instead of down through the layers.

    Args:
        model: any module whose first dimension is the batch.
        rule: a rule instance, for example `DKP()`, or its name in `fb.RULES`, for its defaults: `"dkp"`.
        example: inputs that the model accepts (a tensor, a tuple of arguments or a dict of keywords), of the shape used in
            training. The model runs on them twice, in training mode; buffers, modes and random state are restored.
        sites: where the network is cut. `"layers"`: the activity that enters each Linear layer or convolution after the
            first. `"every-2"`: every second of these, from the last one down (also 3, ...). `"stages"`: the last of each
            height and width. `"blocks"`: the outputs of residual or transformer blocks. Or a list of module names, whose
            outputs are taken, or a function `(name, module) -> bool`. For chains (FA, KP) the sites are the inputs of layers,
            and names are names of layers. For rules with a `derivative`, and for PEPITA, they are the inputs of activation
            modules, and names are names of such modules.
        error_at: the module whose output's error is sent. Layers above it learn by their true gradient. Default: the
            model's output; for direct rules, where a head makes at least four times as many scores of each token as it has
            inputs (a vocabulary), the nearest module's output below it.
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
    if isinstance(rule, str):
        rule = _named(rule)
    if not isinstance(rule, Rule):
        hint = f"{rule.__name__}()" if isinstance(rule, type) else "fb.DKP()"
        raise AttachError(
            f"the rule must be an instance of a Rule, for example {hint}, not {rule!r}."
        )
    refuse_wrapped(model)
    refuse_other_learners(model, in_place)
    refuse_input_gradients(example)
    recorded = trace(model, example)
    refuse_unrecorded(recorded)
    source = find_source(model, recorded, error_at, output)
    lower = below_wide_head(recorded, source) if error_at is None and _is_direct(rule) else None
    find = functools.partial(FINDERS[rule.feeds], model, recorded, sites)
    found, source = _below(find, rule, source, lower)
    if not found:
        raise AttachError(
            f"{type(model).__name__} has no activity to feed between its first Linear or convolution and the source "
            f"{source.name!r}: a network without hidden layers has nothing to send the error to. Recurrent layers count if they "
            "take whole sequences with batch_first=True. For layers of other kinds name the sites, for example "
            'sites=["name"]; or choose a later error_at.'
        )
    learner = Learner(model, rule, tuple(found), source, seed, feedback_dtype)
    tensors = learner.attached.rows.tensors(recorded)
    # the graph of the pass is kept by these alone
    del recorded
    learner._see_rows(tensors, example)
    del tensors
    learner._make_plan(example)
    _warn(learner)
    if in_place:
        learner._hook_root()
    return learner


def _below(
    find: Callable[[Source], Sequence[Site]], rule: Rule, source: Source, lower: Source | None
) -> tuple[Sequence[Site], Source]:
    """The sites below the lower source, and that source; those of the other where the rule or named sites need one above it."""
    if lower is not None:
        with contextlib.suppress(FeedbackError):
            if found := find(lower):
                rule.connect(found, lower)
                return found, lower
    return find(source), source


def _is_direct(rule: Rule) -> bool:
    """Whether the rule sends the source's error, and nothing else, straight to activities."""
    return (
        rule.unlocked == "backward"
        and rule.needs == "error"
        and rule.feeds in (Site, PreActivation)
    )


def _named(name: str) -> Rule:
    """The rule of this name with its defaults."""
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=3, cutoff=0.4) or list(RULES)[:6]
        raise AttachError(
            f"there is no rule {name!r}: nearest names are {', '.join(near)}; all are in fb.RULES."
        )
    return RULES[name]()


def _warn(learner: Learner) -> None:
    """Warn of parameters that nothing trains, and of large feedback, larger than the model, whose form the user chooses."""
    if learner.plan.unreached:
        names = ", ".join(learner.plan.unreached)
        warnings.warn(
            f"no segment trains these parameters: {names}. Freeze them, or choose other sites.",
            stacklevel=3,
        )
    chosen = {
        e.key: learner.weights_of(e)
        for e in learner.graph.edges
        if any(type(part) in OPERATORS.values() for part in within(e.operator))
        and not isinstance(e.site, LayerInput)
    }
    feedback = sum(count_bytes(weights) for weights in chosen.values())
    own = count_bytes(learner.model.parameters())
    if feedback > max(own, LARGE):
        kinds = (w.dtype for weights in chosen.values() for w in weights if w.is_floating_point())
        warnings.warn(
            f"the feedback weights take {in_bytes(feedback)}, the model's own parameters {in_bytes(own)}. Smaller feedback: "
            f"{smaller(learner.graph, next(kinds, torch.float32))}.",
            stacklevel=3,
        )
