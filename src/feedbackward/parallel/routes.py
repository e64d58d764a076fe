"""What travels between the stages of a learner: read from its feedback graph and the places where
the model is divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import Source
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph, Local
from feedbackward.rule import Rule
from feedbackward.schedules.dsp import DSP


@dataclass(frozen=True)
class Routes:
    """Which stage holds which site and source, and what is sent.

    Attributes:
        site_stage, source_stage: the number of the stage, by name.
        uncut: by stage, whether its output is not cut, so that its gradient comes from above.
    """

    graph: Graph
    site_stage: dict[str, int]
    source_stage: dict[str, int]
    uncut: tuple[bool, ...]
    needs_error: bool

    def inside(self, stage: int) -> Graph:
        """The part of the feedback graph that a stage handles by itself."""
        sites = tuple(s for s in self.graph.sites if self.site_stage[s.name] == stage)
        return Graph(
            sites,
            tuple(e for e in self.graph.edges if self._within(e, stage)),
            tuple(end for end in self.graph.local if self._within(end, stage)),
        )

    def from_above(self, stage: int) -> list[tuple[Source, list[Edge]]]:
        """The edges that lead into a stage from sources of later ones, by source."""
        found: dict[Source, list[Edge]] = {}
        for edge in self.graph.edges:
            if self.site_stage[edge.site.name] == stage and not self._within(edge, stage):
                found.setdefault(edge.source, []).append(edge)
        return list(found.items())

    def local_from_above(self, stage: int) -> list[Local]:
        """The local losses of a stage that would join the backward pass in a later one."""
        return [
            end
            for end in self.graph.local
            if self.site_stage[end.site.name] == stage and not self._within(end, stage)
        ]

    def awaited(self, stage: int) -> list[Source]:
        """The sources whose error a stage waits for."""
        return [source for source, _ in self.from_above(stage) if self.sends_error(source)]

    def listeners(self, source: Source) -> list[int]:
        """The stages that wait for the error of a source."""
        last = max(self.source_stage.values(), default=0)
        return [stage for stage in range(last) if source in self.awaited(stage)]

    def sends_error(self, source: Source) -> bool:
        """Whether the signals of a source are made from its error: not where targets are sent."""
        if self.needs_error:
            return True
        return any(site.points == source.points for site in self.graph.sites)

    def _within(self, end: Edge | Local, stage: int) -> bool:
        return self.site_stage[end.site.name] == stage == self.source_stage[end.source.name]


def refuse_rule(rule: Rule, graph: Graph, stages: int) -> None:
    """Refuse, by name, the rules that a pipeline, or one of several stages, cannot follow."""
    why = ""
    rules = graph.rules or (rule,)
    if stages == 1:
        if any(each.in_phase for each in rules):
            raise AttachError(
                f"{rule.label} learns its feedback in a phase of its own, which a pipeline does not run, not even on one process: "
                "train the learner itself, and call `learner.feedback_step(x)`."
            )
        return
    if any(each.sends_activity for each in rules):
        why = "sends activities, which would travel down as well"
    elif graph.upward:
        why = "sends signals upwards, through the layers"
    elif any(end.above is not None for end in graph.local):
        why = "has a feedback net of its own, which runs through all stages"
    elif any(end.reads is not None for end in graph.local):
        why = "has local losses that read an activity of the first stage"
    elif graph.branches is not None:
        why = "sends errors along skip paths, through the branches of the whole network"
    elif any(each.in_phase for each in rules):
        why = "learns its feedback in a phase of its own, whose passes run through the whole model"
    elif isinstance(rule, DSP):
        why = "is a schedule of late gradients as well"
    if why:
        raise AttachError(
            f"{rule.label} cannot be divided over several stages: it {why}. Use it on one process or under "
            "DistributedDataParallel; or use DKP, DFA, KolenPollack, DRTP or DGL."
        )


def refuse_common(routes: Routes) -> None:
    """Refuse learned feedback weights that sites of several stages have in common."""
    holders: dict[str, set[int]] = {}
    for edge in routes.graph.edges:
        if edge.rule.learned:
            holders.setdefault(edge.key, set()).add(routes.site_stage[edge.site.name])
    for key, stages in holders.items():
        if len(stages) > 1:
            raise AttachError(
                f"stages {sorted(stages)} have the learned feedback weights {key!r} in common, and each would train "
                "a copy of its own: use an operator whose weights belong to one site (fb.Dense, fb.LowRank)."
            )


def stage_of(time: float, boundaries: Sequence[int]) -> int:
    """The stage in which something happens, from its time and those of the boundaries; what
    happens at a boundary is the end of the stage below it."""
    return sum(time > boundary for boundary in boundaries)
