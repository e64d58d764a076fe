"""Sites together with the layers above them and the model's input, for rules whose auxiliary networks depend on these."""

from __future__ import annotations

import math

from torch import nn

from feedbackward.activity import LayerAbove, Site, SiteInContext, Source
from feedbackward.model.autograd_graph import outputs_behind
from feedbackward.model.sites import Sites, find_sites, model_input
from feedbackward.model.source import source_tensor
from feedbackward.model.trace import PARAMETRIC, Call, Trace
from feedbackward.operators.layer import LayerForm


def find_in_context(
    model: nn.Module, trace: Trace, sites: Sites, source: Source
) -> list[SiteInContext]:
    """The sites that `find_sites` finds, each with the layers above it. Raises as `find_sites` does."""
    into = model_input(trace)
    layers = [(c.start, layer) for c, layer in _layers(trace, source)]
    found = []
    for site in find_sites(model, trace, sites, source):
        made = _time(trace, site)
        above = tuple(layer for start, layer in layers if start >= made)
        kept = (site.name, site.points, site.shape, site.tokens, site.unflattened, site.apart)
        found.append(SiteInContext(*kept, above=above, input=into))
    return found


def _layers(trace: Trace, source: Source) -> list[tuple[Call, LayerAbove]]:
    """The layers that lead to the source, but for the last, in the order in which they run."""
    tensor, end = source_tensor(trace, source)
    behind = outputs_behind(tensor)
    calls = [
        call
        for call in trace.calls
        if isinstance(call.module, PARAMETRIC)
        and call.end <= end
        and call.inputs
        and not behind.isdisjoint(call.left)
    ]
    found = []
    for call in calls[:-1]:
        form = LayerForm.of(call.module)
        # 1x1 with a stride: a shortcut round a residual branch
        projection = form.stride and math.prod(form.shape[2:]) < math.prod(form.stride)
        if trace.counts[call.name] == 1 and not form.transposed and not projection:
            ends = call.activity[1], call.outputs[0][0]
            entering, leaving = (tuple(t.shape[1:]) for t in ends)
            found.append((call, LayerAbove(form, entering, leaving)))
    return found


def _time(trace: Trace, site: Site) -> int:
    """When the site is made; of every call when the last one is."""
    point = site.points[0]
    call = trace.calls_of(point.module)[point.call]
    return call.end if point.kind == "output" else call.start
