"""Graph nets by direct feedback: GCN and GAT on citation graphs, rows are nodes, the loss is over the labelled ones.

python bench/graphs.py --data-root DIR                 # DIR/small/cora.npz, citeseer.npz with the public splits
python bench/graphs.py --data-root DIR --graphs cora --nets gcn --seeds 0,1,2 --json graphs.json

Two layers, 64 hidden units, dropout 0.5, 100 epochs of Adam (decay 5e-4), whole graph. The rate of every rule is the best of
three on the validation nodes, with one seed that is not among the results. Needs torch_geometric. Small: public splits of 140
and 120 labelled nodes, 1,000 test nodes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv

import feedbackward as fb

RULES = {"BP": fb.BP(), "DFA": fb.DFA(), "DKP": fb.DKP(), "Frozen": fb.Frozen()}
RATES, SEARCH_SEED, EPOCHS = (0.003, 0.01, 0.03), 100, 100


class Net(nn.Module):
    """Two graph convolutions; the activation between them is a module, so that it can be a site."""

    def __init__(self, kind: str, features: int, classes: int, hidden: int = 64) -> None:
        super().__init__()
        if kind == "gcn":
            first, second = GCNConv(features, hidden), GCNConv(hidden, classes)
        else:
            first = GATConv(features, hidden // 8, heads=8, dropout=0.5)
            second = GATConv(hidden, classes, dropout=0.5)
        self.first, self.act, self.drop, self.second = first, nn.ELU(), nn.Dropout(0.5), second

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.act(self.first(F.dropout(x, 0.5, self.training), edges))
        return self.second(self.drop(h), edges)


def load(path: Path) -> dict[str, Tensor]:
    """Features with rows of sum 1, edges, labels and the split."""
    d = np.load(path)
    x = np.zeros(tuple(d["x_shape"]), dtype=np.float32)
    rows = np.repeat(np.arange(len(x)), np.diff(d["x_indptr"]))
    x[rows, d["x_indices"]] = d["x_data"]
    x /= np.maximum(x.sum(1, keepdims=True), 1e-12)
    found = {"x": torch.from_numpy(x), "edges": torch.from_numpy(d["edge_index"].astype(np.int64))}
    return found | {
        k: torch.from_numpy(d[k].astype(np.int64)) for k in ("y", "train", "val", "test")
    }


def train(kind: str, rule: fb.Rule, lr: float, seed: int, g: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy in percent on the validation and test nodes after the last epoch."""
    torch.manual_seed(seed)
    model = Net(kind, g["x"].shape[1], int(g["y"].max()) + 1)
    given = g["x"], g["edges"]
    learner = fb.attach(model, rule, example=given, sites=["act"], seed=seed)
    optimizer = torch.optim.Adam(learner.parameters(), lr=lr, weight_decay=5e-4)
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        F.cross_entropy(learner(*given)[g["train"]], g["y"][g["train"]]).backward()
        optimizer.step()
    learner.eval()
    with torch.no_grad():
        right = learner(*given).argmax(1) == g["y"]
    return {part: 100 * right[g[part]].double().mean().item() for part in ("val", "test")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--graphs", default="cora,citeseer")
    parser.add_argument("--nets", default="gcn,gat")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path, default=Path("graphs.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = (
        json.loads(options.json.read_text()) if options.json.exists() else []
    )
    done = {(r["graph"], r["net"], r["rule"]) for r in rows}
    for graph in options.graphs.split(","):
        g = load(options.data_root / "small" / f"{graph}.npz")
        for net in options.nets.split(","):
            for name, rule in RULES.items():
                if (graph, net, name) in done:
                    continue
                began = time.perf_counter()
                found = {lr: train(net, rule, lr, SEARCH_SEED, g)["val"] for lr in RATES}
                lr = max(found, key=lambda rate: found[rate])
                tests = [train(net, rule, lr, int(s), g)["test"] for s in options.seeds.split(",")]
                spread = statistics.stdev(tests) if len(tests) > 1 else 0.0
                print(
                    f"{graph} {net} {name}: {statistics.mean(tests):.1f} ± {spread:.1f} at {lr:g}",
                    flush=True,
                )
                row = {
                    "graph": graph,
                    "net": net,
                    "rule": name,
                    "lr": lr,
                    "validation": found,
                    "test": tests,
                }
                rows.append(
                    row
                    | {
                        "seconds": time.perf_counter() - began,
                        "torch": torch.__version__,
                        "machine": platform.machine(),
                    }
                )
                options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
