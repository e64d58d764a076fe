"""The nodes of one graph: all of them are the input, and a split says which have a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.data.digest import digest_of
from feedbackward.experiment.data.loader import Batches
from feedbackward.experiment.data.named import (
    file_digest,
    find_file,
    read_arrays,
    refuse_options,
)
from feedbackward.experiment.data.splits import SPLIT_SEED, SplitData, split_order

# graphs known by name, and where they lie below the data root
GRAPHS = {name: f"small/{name}.npz" for name in ("cora", "citeseer", "amazon-photo")}
# a label that is in no loss: PyTorch's own number for it
LEFT_OUT = -100
SPLITS = ("train", "val", "test")
_ARRAYS = ("x_indptr", "x_indices", "x_data", "x_shape", "y", "edge_index")


@dataclass(frozen=True)
class Nodes:
    """Some nodes of a graph.

    Attributes:
        features: float32 [N, F], of all nodes.
        edges: int64 [2, E], from and to.
        labels: int64 [N], of all nodes.
        index: int64 [n], the nodes that are meant.
    """

    features: Tensor
    edges: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Tensor) -> Nodes:
        """Those of these nodes at `index` (int64 [k]), in the same graph."""
        return Nodes(self.features, self.edges, self.labels, self.index[index])

    def digest(self) -> str:
        """SHA-256 over the graph and the nodes that are meant."""
        return digest_of(self.features, self.edges, self.labels, self.index)


class NodeLoader(Batches):
    """The whole graph (features [N, F], edges [2, E]), and the labels [N] of some of its nodes, the others `LEFT_OUT`."""

    examples: Nodes

    def rows(self, index: Tensor, epoch: int, batch: int) -> tuple[Any, Tensor]:
        nodes = self.examples
        chosen = nodes.index[index]
        target = torch.full_like(nodes.labels, LEFT_OUT)
        target[chosen] = nodes.labels[chosen]
        inputs = nodes.features.to(self.device), nodes.edges.to(self.device)
        return inputs, target.to(self.device)


def load_graph(config: DataConfig) -> SplitData:
    """Read a graph from an .npz file. Held-out nodes are in no training loss, but their features and edges are seen.

    Its arrays: features in CSR form (`x_indptr`, `x_indices`, `x_data`, `x_shape`), labels `y`, `edge_index` [2, E], and the
    nodes of its own split, `train`, `val` and `test`. Without these, 20 nodes of each class are trained on, and half of
    the others each are held out and tested on, in a fixed random order. The features of a node are divided by their sum.

    Raises DataError for a file that is missing or does not fit, and ConfigError for an option that is not of graphs.
    """
    refuse_options(config, "a graph", "classes", "size", "augment", "tokens", "context")
    path = find_file(config, GRAPHS, "graph")
    arrays = read_arrays(path, _ARRAYS)
    labels = torch.from_numpy(arrays["y"].astype(np.int64))
    edges = torch.from_numpy(arrays["edge_index"].astype(np.int64))
    features = _features(arrays, str(path))
    count = len(labels)
    if len(features) != count or edges.shape[0] != 2 or edges.min() < 0 or edges.max() >= count:
        raise DataError(
            f"the arrays of {path} do not fit: {len(features)} rows of features, {count} labels, edges {list(edges.shape)}"
        )
    own = all(name in arrays for name in SPLITS)
    given = [arrays[name] for name in SPLITS] if own else _drawn(arrays["y"])
    limits = (config.train_limit, config.validation, config.test_limit)
    train, validation, test = (
        Nodes(features, edges, labels, torch.from_numpy(part.astype(np.int64))[:limit])
        for part, limit in zip(given, limits, strict=True)
    )
    if not (len(train) and len(validation) and len(test)):
        raise ConfigError(f"a split of {path} has no nodes: leave out data limits of 0")
    note = "" if own else f"the split is drawn (seed {SPLIT_SEED}), 20 nodes of a class"
    classes = [str(i) for i in range(int(labels.max()) + 1)]
    shape = (features.shape[1],)
    form = {"features": shape[0], "input": "features of each node, with sum 1, and edges"}
    return SplitData(path.stem, train, validation, test, classes, shape, form, note)


def fingerprint_graph(config: DataConfig) -> str:
    """A digest that is another as soon as the file has changed. Raises as `load_graph` does."""
    return file_digest(find_file(config, GRAPHS, "graph"))


def _features(arrays: dict[str, Any], path: str) -> Tensor:
    """[N, F], each row divided by its sum."""
    rows, columns = (int(n) for n in arrays["x_shape"])
    dense = np.zeros((rows, columns), np.float32)
    try:
        row = np.repeat(np.arange(rows), np.diff(arrays["x_indptr"]))
        dense[row, arrays["x_indices"]] = arrays["x_data"]
    except (IndexError, ValueError) as error:
        raise DataError(f"the features of {path} are no CSR matrix: {error}") from error
    found = torch.from_numpy(dense)
    size = found.sum(1, keepdim=True)
    return found / torch.where(size == 0, 1.0, size)


def _drawn(labels: np.ndarray) -> list[np.ndarray]:
    """A split of our own: 20 nodes of each class, then halves of the others."""
    order = split_order(len(labels))
    train = np.concatenate([order[labels[order] == c][:20] for c in np.unique(labels)])
    rest = order[~np.isin(order, train)]
    return [train, rest[: len(rest) // 2], rest[len(rest) // 2 :]]
