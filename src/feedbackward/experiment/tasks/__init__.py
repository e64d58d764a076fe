"""Tasks by name."""

from __future__ import annotations

from typing import Any

from feedbackward.experiment.data.clicks import fingerprint_clicks, load_clicks
from feedbackward.experiment.data.dataset import Loader, fingerprint_data, load_data
from feedbackward.experiment.data.loader import Batches
from feedbackward.experiment.data.music import PieceLoader, fingerprint_music, load_music
from feedbackward.experiment.data.nodes import NodeLoader, fingerprint_graph, load_graph
from feedbackward.experiment.data.picture import fingerprint_picture, load_picture
from feedbackward.experiment.data.sentences import fingerprint_sentences, load_sentences
from feedbackward.experiment.data.splits import PairLoader
from feedbackward.experiment.data.text import fingerprint_text, load_text
from feedbackward.experiment.tasks.task import AnyData, Classes, Clicks, Frames, Task, Values

__all__ = ["TASKS", "AnyData", "Task"]


def _plain(kind: type[Batches]) -> Any:
    """A loader that has no use for the data set and augments nothing."""

    def batches(
        split: Any, data: AnyData, *options: Any, augment: str = "none", **named: Any
    ) -> Batches:
        return kind(split, *options, **named)

    return batches


_ALL = (
    Classes("classification", load_data, fingerprint_data, Loader, 250),
    Classes("language_model", load_text, fingerprint_text, _plain(PairLoader), 64),
    # a pass takes the whole graph, however many of its nodes have a loss
    Classes(
        "node_classification",
        load_graph,
        fingerprint_graph,
        _plain(NodeLoader),
        1_000_000,
        whole=True,
    ),
    Frames(
        "music",
        load_music,
        fingerprint_music,
        _plain(PieceLoader),
        16,
        whole=True,
        labelled=False,
    ),
    Values(
        "regression", load_picture, fingerprint_picture, _plain(PairLoader), 4096, labelled=False
    ),
    Classes("sentences", load_sentences, fingerprint_sentences, _plain(PairLoader), 256),
    Clicks(
        "recommendation", load_clicks, fingerprint_clicks, _plain(PairLoader), 4096, ranked=True
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
