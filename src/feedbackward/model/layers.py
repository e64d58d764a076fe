"""Finding the sites of a chain: the input of each Linear layer or convolution, fed from that layer's own output."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from feedbackward.activity import HookPoint, LayerInput, PreActivation, Source
from feedbackward.errors import AttachError, SiteError
from feedbackward.model.autograd_graph import (
    PASSING,
    below,
    dominators,
    is_leaf,
    is_product,
    made_of_weights,
    storage_of,
    walk,
    weight_behind,
    weights_behind,
)
from feedbackward.model.branches import branch_inputs
from feedbackward.model.features import CONVOLUTIONS
from feedbackward.model.matrix import matrix_form
from feedbackward.model.places import known_modules
from feedbackward.model.sites import Sites
from feedbackward.model.source import source_tensor
from feedbackward.model.trace import ELEMENTWISE, PARAMETRIC, Call, Trace
from feedbackward.model.values import tensors_in
from feedbackward.operators.layer import LayerForm


def find_layer_inputs(
    model: nn.Module, trace: Trace, sites: Sites, source: Source
) -> list[LayerInput]:
    """The input of every Linear layer or convolution whose input depends on parameters, in forward order.

    `sites` is `"layers"`, names of such layers, or a predicate. Layers that are left out send the error on through their
    own weights, as in backprop.

    Raises AttachError where an error would silently travel through weights that no layer input replaces.
    """
    final, end = source_tensor(trace, source)
    above = tensors_in(trace.output)
    # the errors of the other outputs travel down the chain as well
    if any(t is final for t in above):
        end = max(call.end for call in trace.calls)
    else:
        above = [final]
    calls = [c for c in trace.calls if c.end <= end and c.inputs and _is_layer(c)]
    fed = [c for c in calls if c.activity[1].requires_grad]
    if sites == "layers":
        _refuse_hidden_weights(model, above, calls)
        return _layer_inputs(trace, fed, final)
    wanted, chosen = _wanted(model, sites, {c.name for c in calls})
    missing = [name for name in wanted if name not in {c.name for c in fed}]
    if missing and chosen:
        raise SiteError(
            f"{missing[0]!r} is not a layer that a chain can feed: name Linear or convolution layers after the first and "
            "before the source."
        )
    return _layer_inputs(trace, [call for call in fed if call.name in wanted], final)


def _layer_inputs(trace: Trace, calls: Iterable[Call], final: Tensor) -> list[LayerInput]:
    dominates = dominators(final)
    found = {call.start: _layer_input(trace, call, call.left[0][0] in dominates) for call in calls}
    for start, branch in branch_inputs(trace, final):
        first = min((when for when in found if when >= start), default=None)
        if first is not None:
            layer = found[first]
            found[first] = replace(layer, branches=(*layer.branches, branch))
    return list(found.values())


def _layer_input(trace: Trace, call: Call, dominates: bool) -> LayerInput:
    if trace.counts[call.name] > 1:
        raise AttachError(
            f"layer {call.name!r} is called {trace.counts[call.name]} times in one forward pass, and a chain feeds each layer "
            "once. Use a module of its own for each call, or a rule with direct feedback."
        )
    weight, form = _form(call)
    number, into, _ = call.activity
    out = call.outputs[0][0]
    linear = not form.stride
    points = (HookPoint(call.name, "output"),)
    source = Source(call.name, points, tuple(out.shape[1:]), out.dim() - 2 if linear else 0)
    return LayerInput(
        f"{call.name}.input",
        (HookPoint(call.name, "input", call.index, place=call.places[number]),),
        tuple(into.shape[1:]),
        into.dim() - 2 if linear else 0,
        source=source,
        form=form,
        weight=f"{call.name}.{weight}",
        below=_below(trace, call),
        dominates=dominates,
    )


def _is_layer(call: Call) -> bool:
    return isinstance(call.module, PARAMETRIC) or matrix_form(call) is not None


def _form(call: Call) -> tuple[str, LayerForm]:
    """The name of the layer's weight, and the layer's form in this call.

    Raises AttachError for a layer that uses its weight in another way than its class: a plain `B` could not replace it.
    """
    found = matrix_form(call)
    if found is not None:
        return found
    _refuse_other_forms(call)
    form = LayerForm.of(call.module)
    if not form.transposed:
        return "weight", form
    # `output_size` overrides the output padding of a transposed convolution
    extra = form.extra(call.outputs[0][0].shape[2:], call.activity[1].shape[2:])
    # the second argument, by position or by name, is a list
    chosen = any(place.startswith(("[0][1]", "[1]['output_size']")) for place in call.given)
    return "weight", replace(form, output_padding=extra, output_size=chosen)


def _below(trace: Trace, call: Call) -> PreActivation | str:
    """The output of the layer before this one.

    If more than one elementwise activation lies between, the result is a text that names it.
    """
    activation: nn.Module | None = None
    before, (_, tensor, version) = call, call.activity
    while True:
        made = trace.producer(tensor, version, before.start)
        if made is None:
            return "an operation that is no module of its own"
        before = made[0]
        if _is_layer(before):
            break
        if type(before.module) in ELEMENTWISE and activation is None:
            activation = before.module
        elif not isinstance(before.module, nn.Flatten):
            return f"{before.name or 'the model'!r} ({type(before.module).__name__})"
        _, tensor, version = before.activity
    tokens = 0 if isinstance(before.module, CONVOLUTIONS) else tensor.dim() - 2
    points = (HookPoint(before.name, "output"),)
    f = (activation or nn.Identity()).forward
    return PreActivation(before.name, points, tuple(tensor.shape[1:]), tokens, activation=f)


def _refuse_other_forms(call: Call) -> None:
    kind = type(call.module)
    base = next(c for c in PARAMETRIC if issubclass(kind, c))
    if any(
        getattr(kind, name, None) is not getattr(base, name, None)
        for name in ("forward", "_conv_forward")
    ):
        raise AttachError(
            f"layer {call.name!r} is a {kind.__name__}, which changes how {base.__name__} uses its weight, so feedback of that shape "
            "would not stand for it. Use a rule with direct feedback, or leave the layer out with `sites=`."
        )
    if not _is_product(call.left[0][0]):
        raise AttachError(
            f"layer {call.name!r} ({kind.__name__}) returns something else than the product with its weight: a hook or a forward of "
            "its own changes it, and feedback of the weight's shape would not stand for that. Use a rule with direct feedback, or "
            "leave the layer out with `sites=`."
        )


def _is_product(node: Any) -> bool:
    """Whether a layer's output, which this node made, is a product, up to a bias, views and casts."""
    while node is not None and not is_product(node):
        name = node.name()
        inner = [n for n in below(node) if not is_leaf(n)]
        plain = name.removesuffix("Backward0") in PASSING or name.startswith(("Add", "Compiled"))
        if not plain or len(inner) > 1:
            return False
        node = inner[0] if inner else None
    return True


def _wanted(model: nn.Module, sites: Sites, layers: set[str]) -> tuple[list[str], bool]:
    """The names, and whether the user gave them one by one."""
    if isinstance(sites, str) and (sites in ("blocks", "stages") or sites.startswith("every-")):
        raise AttachError(
            'a chain runs from layer to layer: use sites="layers", names of layers, or a predicate.'
        )
    if callable(sites):
        return [n for n, m in model.named_modules() if n in layers and sites(n, m)], False
    return known_modules(model, [sites] if isinstance(sites, str) else sites), True


def _refuse_hidden_weights(model: nn.Module, outputs: Iterable[Tensor], calls: list[Call]) -> None:
    """Refuse a product of an activity with a parameter outside a layer: it would send the error through true weights."""
    names = {id(p): name for name, p in model.named_parameters()}
    layers = {id(p) for call in calls for p in call.module.parameters(recurse=False)}
    own = {storage_of(t) for t in itertools.chain(model.parameters(), model.buffers())}
    outputs = list(outputs)
    alone = made_of_weights(outputs, own)
    for node in walk(t.grad_fn for t in outputs):
        recurrent = "Rnn" in node.name() or "Lstm" in node.name() or "Gru" in node.name()
        if (not recurrent and not is_product(node)) or node in alone:
            # below what weights alone have made nothing gets an error
            continue
        for factor in node.next_functions:
            single = weight_behind(factor) if factor[0] is not None else None
            behind = [single] if single is not None else weights_behind(factor, alone)
            # a layer's own product is fed, and a tensor from outside the model is left alone
            hidden = [p for p in behind if id(p) in names and p.dim() > 1]
            if hidden and not any(id(p) in layers for p in behind):
                raise AttachError(_hidden_weight(model, names[id(hidden[0])]))


def _hidden_weight(model: nn.Module, name: str) -> str:
    owner = name.rpartition(".")[0]
    attention = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.MultiheadAttention) and f"{name}.".startswith(f"{n}.")
    ]
    owner = attention[0] if attention else owner
    kind = type(model.get_submodule(owner))
    why = (
        "nn.MultiheadAttention applies its projections without calling them as modules"
        if attention
        else f"its parameter {name!r} multiplies an activity outside a Linear or convolution that is called as a module"
    )
    return (
        f"a chain cannot see into {owner or kind.__name__!r}: {why}, so the error would travel through true weights there. Use a "
        'rule with direct feedback (DFA, DKP; sites="blocks"), write it with nn.Linear layers, or name the layers to feed with '
        "`sites=`."
    )
