"""What a feedback graph requires of its model."""

from __future__ import annotations

from torch import nn

from feedbackward.errors import AttachError
from feedbackward.graph import Graph
from feedbackward.rule import Rule


def check_graph(model: nn.Module, rule: Rule, graph: Graph) -> None:
    """Refuse a graph without cuts, relays that no module makes, and weights that cannot be shared.

    Raises AttachError. A graph without cuts would be plain backprop.
    """
    if not graph.sites and rule.transport is not True:
        raise AttachError(
            f"{rule.label} cuts nothing here, so it would be plain backprop; its graph() must return sites."
        )
    _check_every(rule, graph)
    made = [
        source for source in graph.sources if any(point.kind == "input" for point in source.points)
    ]
    if made:
        raise AttachError(
            f"{rule.label} sends on the error that arrives at {made[0].name!r}, but no module makes that tensor (a functional "
            'activation or addition), so not all of its error can be seen. Write it as a module (nn.ReLU), use sites="blocks" or name '
            "modules as sites; or use a rule that sends the output's error (DFA, DKP)."
        )
    for edge in graph.edges:
        for named, does in (
            (edge.shares, "gives B the gradient of"),
            (edge.forward_weight, "makes B from"),
        ):
            if named is None:
                continue
            owner, _, leaf = named.rpartition(".")
            weight = model.get_submodule(owner)._parameters.get(leaf)
            if weight is None:
                raise AttachError(
                    f"{rule.label} {does} {named!r}, which is re-parametrised (weight norm, pruning, ...). Remove "
                    "the parametrisation, or use FA or a rule with direct feedback."
                )
            uses = [
                name for name, p in model.named_parameters(remove_duplicate=False) if p is weight
            ]
            if len(uses) > 1 and named == edge.shares:
                raise AttachError(
                    f"{rule.label} {does} {named!r}, which is tied ({' and '.join(uses)}) and gets the sum of "
                    "several. Untie the weights, take the error below them (`error_at=`), or use FA or a rule with direct feedback."
                )


def _check_every(rule: Rule, graph: Graph) -> None:
    """Refuse what is not made for a site whose module is called many times: all but an error that comes straight to it."""
    many = graph.repeated
    ends = {edge.source for edge in graph.edges if edge.source.every}
    phased = any(edge.rule.in_phase for edge in graph.edges if edge.site.every)
    if many and (ends or phased or graph.upward or graph.branches):
        raise AttachError(
            f"{rule.label} sends on the signal of {many[0].name!r}, or learns its feedback in a phase, and this module is called many "
            "times in one pass. Use a rule that sends the output's error (DFA, DKP), or sites that are called once."
        )
    apart = [edge for edge in graph.edges if edge.site.apart]
    if any(edge.rule.in_phase for edge in apart):
        raise AttachError(
            f"{rule.label} learns its feedback in a phase, in which a token's activity must belong to a token's error, and those of "
            f"{apart[0].site.name!r} are others than those of {apart[0].source.name!r} (an encoder's, or a context). Use "
            "DFA or DKP, or sites in the decoder."
        )
