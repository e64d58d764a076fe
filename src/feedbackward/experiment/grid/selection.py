"""The part of a grid that is to be run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.schema import Only
from feedbackward.experiment.config.suggest import hint
from feedbackward.experiment.grid.candidates import Candidate
from feedbackward.experiment.grid.plan import Block, Plan, in_words
from feedbackward.experiment.grid.progress_table import Key


@dataclass(frozen=True)
class Selection:
    """The part of a plan that is to be run. Raises ConfigError for a name that the plan does not have."""

    plan: Plan
    only: Only

    def __post_init__(self) -> None:
        configs = [comparison.config for comparison in self.plan.comparisons.values()]
        candidates = [c for found in self.plan.comparisons.values() for c in found.candidates]
        known: dict[str, set[Any]] = {
            "models": {config.model for config in configs},
            "data": {in_words("data.name", config.data.name) for config in configs},
            "rules": {name for c in candidates for name in (c.entry.rule, c.label)},
            "sections": {block.section for block in self.plan.blocks},
            "seeds": {seed for config in configs for seed in config.seeds},
        }
        for what, names in known.items():
            for name in getattr(self.only, what) or ():
                if name not in names:
                    near = hint(str(name), sorted(map(str, names)))
                    raise ConfigError(f"--only.{what}: there is no '{name}' here: {near}")

    def blocks(self) -> Iterator[Block]:
        """Those with something to run."""
        for block in self.plan.blocks:
            config = self.plan.of(block).config
            wanted = (
                (self.only.sections, block.section),
                (self.only.models, config.model),
                (self.only.data, in_words("data.name", config.data.name)),
            )
            if all(names is None or name in names for names, name in wanted):
                yield block

    def cells(self) -> Iterator[tuple[str, Candidate, int]]:
        """Folder, rule and seed of every cell to run: the first seed of all, then the second."""
        chosen: dict[Key, tuple[str, Candidate, int]] = {}
        only = self.only
        for block in self.blocks():
            for candidate in self.plan.of(block).candidates:
                names = {candidate.label, candidate.entry.rule}
                if candidate.label in block.labels and (
                    only.rules is None or names & {*only.rules}
                ):
                    for place, seed in enumerate(block.seeds):
                        if only.seeds is None or seed in only.seeds:
                            key = block.folder, candidate.label, place
                            chosen.setdefault(key, (block.folder, candidate, seed))
        order = sorted(chosen, key=lambda key: key[2])  # stable
        yield from (chosen[key] for key in order)
