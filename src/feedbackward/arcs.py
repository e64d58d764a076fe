"""Finding the arcs of a chain: the input of each parametric layer, fed from that layer's own output."""

from __future__ import annotations

from torch import nn

from .errors import AttachError, SiteError
from .graph import Arc, Source, Tap
from .operators.layer import LayerForm
from .sites import Sites, known_modules, source_tensor
from .trace import PARAMETRIC, Call, Trace, ancestors

_HARMLESS = (nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, nn.GroupNorm)


def find_arcs(model: nn.Module, trace: Trace, sites: Sites, source: Source) -> list[Arc]:
    """One arc per Linear or convolution whose input depends on parameters, in forward order.

    `sites` is `"layers"`, names of such layers, or a predicate; layers that are left out pass the error on through
    their own weights, as in backprop.

    Raises AttachError where an error would silently travel through weights that no arc stands for.
    """
    final, end = source_tensor(trace, source)
    upstream = ancestors(final)
    calls = [c for c in trace.calls if isinstance(c.module, PARAMETRIC)]
    calls = [c for c in calls if c.inputs and c.inputs[0][0].requires_grad and c.end <= end]
    calls = [c for c in calls if c.outputs[0][0].grad_fn in upstream]
    if sites == "layers":
        _refuse_hidden_weights(trace)
    else:
        wanted = _wanted(model, sites)
        missing = [name for name in wanted if name not in {c.name for c in calls}]
        if missing:
            raise SiteError(
                f"{missing[0]!r} is not a layer that a chain can feed: name Linear or convolution layers after the first "
                "and before the source."
            )
        calls = [c for c in calls if c.name in wanted]
    return [_arc(trace, call) for call in calls]


def _arc(trace: Trace, call: Call) -> Arc:
    if trace.counts[call.name] > 1:
        raise AttachError(
            f"layer {call.name!r} is called {trace.counts[call.name]} times in one forward pass, and a chain feeds each layer "
            "once. Use a module of its own for each call, or a rule with direct feedback."
        )
    into, out = call.inputs[0][0], call.outputs[0][0]
    linear = isinstance(call.module, nn.Linear)
    source = Source(
        call.name, (Tap(call.name, "output"),), tuple(out.shape[1:]), out.dim() - 2 if linear else 0
    )
    form = LayerForm.of(call.module)
    tap = Tap(call.name, "input", call.index)
    tokens = into.dim() - 2 if linear else 0
    shape = tuple(into.shape[1:])
    return Arc(
        f"{call.name}.input", (tap,), shape, tokens, source=source, form=form, weight=f"{call.name}.weight"
    )


def _wanted(model: nn.Module, sites: Sites) -> list[str]:
    if sites == "blocks":
        raise AttachError(
            'a chain runs from layer to layer: use sites="layers", names of layers, or a predicate.'
        )
    if callable(sites):
        layers = ((n, m) for n, m in model.named_modules() if isinstance(m, PARAMETRIC))
        return [n for n, m in layers if sites(n, m)]
    return known_modules(model, [sites] if isinstance(sites, str) else sites)


def _refuse_hidden_weights(trace: Trace) -> None:
    """Matrices that are not the weight of a Linear or convolution called as a module pass the true error on."""
    for call in trace.calls:
        module = call.module
        if isinstance(module, (*PARAMETRIC, *_HARMLESS)):
            continue
        hidden = [
            name for name, p in module.named_parameters(recurse=False) if p.dim() > 1 and min(p.shape) > 1
        ]
        if not hidden:
            continue
        what = (
            "nn.MultiheadAttention applies its projections without calling them as modules"
            if isinstance(module, nn.MultiheadAttention)
            else f"{type(module).__name__} multiplies by its own {hidden[0]!r}"
        )
        raise AttachError(
            f"a chain cannot see into {call.name!r}: {what}, so the error would travel through true weights there. Use a rule with "
            'direct feedback (DFA, DKP; sites="blocks"), write it with nn.Linear layers, or name the layers to feed with `sites=`.'
        )
