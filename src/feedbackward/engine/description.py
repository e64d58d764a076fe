"""What a learner will train, and how: the table that `print(learner)` shows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import Tensor

from feedbackward.activity import LayerInput
from feedbackward.engine.attached import Attached
from feedbackward.engine.html import html_table
from feedbackward.engine.size import in_bytes
from feedbackward.engine.weights import count_bytes

# operators whose weights' shape says what they are
_SELF_EVIDENT = ("Dense", "LayerShaped")


HEADS = ("site", "activity", "feedback", "bytes", "trains")
MOST_NOTES, WIDEST = 5, 140


def describe(attached: Attached) -> str:
    """The plan as text: a row per site, then the head, then whatever is irregular."""
    rows = [HEADS, *_rows(attached)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]
    below = [f"  {line}" for line in [*lines, *_notes(attached)]]
    return "\n".join(_cut(line) for line in [_title(attached), *below])


def describe_html(attached: Attached) -> str:
    """The same for a notebook."""
    notes = "".join(f"<div>{escape(_cut(note))}</div>" for note in _notes(attached))
    return html_table(HEADS, _rows(attached), _title(attached)) + notes


def _title(attached: Attached) -> str:
    # the size of the plan first: a rule with many options is cut
    return (
        f"{attached.rule.label} on {type(attached.model).__name__}: {len(attached.graph.sites)} sites, "
        f"error of {attached.source.name!r}, feedback {in_bytes(attached.feedback_bytes)}; {attached.rule}"
    )


def _rows(attached: Attached) -> list[tuple[str, ...]]:
    plan = attached.plan
    edges = {edge.site: edge for edge in attached.graph.edges}
    local = {end.site: end for end in attached.graph.local}
    lifted = {upward_edge.above: upward_edge.below.name for upward_edge in attached.graph.upward}
    rows: list[tuple[str, ...]] = []
    for site, segment in zip(attached.graph.sites, plan.segments, strict=True):
        edge = edges.get(site)
        form = "in a phase" if attached.rule.revises else "none: frozen"
        held = tuple[Tensor, ...]()
        if edge:
            held = attached.weights_of(edge)
            form = (
                " + ".join(_size(w.shape) for w in held)
                or f"made from {edge.forward_weight or 'the seed'}:"
            )
            kind = type(edge.operator).__name__
            form += "" if kind in _SELF_EVIDENT else f" {kind}"
        elif site in local:
            auxiliary = attached.feedback.get_submodule(local[site].key)
            form, held = "a loss of its own", (*auxiliary.parameters(), *auxiliary.buffers())
        elif site in lifted:
            form = f"up from {lifted[site]}"
        size = in_bytes(count_bytes(held)) if edge or site in local else ""
        rows.append((site.name, _size(site.shape), form, size, _list(segment.parameters)))
    rows.append((plan.head.site, "", "true gradient", "", _list(plan.head.parameters)))
    return rows


def _notes(attached: Attached) -> list[str]:
    plan = attached.plan
    # of layer_inputs it is the rule: skip paths stay whole
    shared = {} if issubclass(attached.rule.feeds, LayerInput) else plan.shared
    notes = _some(
        [f"in several segments (gradients add up): {n} in {_list(s)}" for n, s in shared.items()]
    )
    return notes + _some([f"not trained, no segment reaches it: {name}" for name in plan.unreached])


def _some(notes: list[str]) -> list[str]:
    """The first of the notes, and how many more there are."""
    rest = len(notes) - MOST_NOTES
    return [*notes[:MOST_NOTES], *([f"... and {rest} more of these"] if rest > 0 else [])]


def _cut(line: str) -> str:
    return line if len(line) <= WIDEST else f"{line[: WIDEST - 3]}..."


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "1"


def _list(names: Sequence[str]) -> str:
    return (
        ", ".join(names)
        if len(names) <= 4
        else f"{', '.join(names[:3])}, ... ({len(names)} tensors)"
    )
