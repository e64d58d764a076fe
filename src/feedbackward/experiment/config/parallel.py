"""How a run is divided over processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How a run is divided over processes.

    Attributes:
        pipeline: divide the network over so many processes, with the rule's own messages between them; 0
            trains as a whole.
        data: so many pipelines, each with its part of every batch.
        micro_batches: parts of a batch, which follow each other through a pipeline.
        cut: names of modules after whose outputs the network is divided; auto balances measured times.
        trace: write what every process did in three steps as a Chrome trace, .json, and a picture beside it.
        timeout: seconds after which a wait for another process is an error.
    """

    pipeline: int = 0
    data: int = 1
    micro_batches: int = 4
    cut: str | list[str] = "auto"
    trace: str | None = None
    timeout: float = 60.0

    @property
    def processes(self) -> int:
        """How many a run takes."""
        return max(1, self.pipeline) * max(1, self.data)
