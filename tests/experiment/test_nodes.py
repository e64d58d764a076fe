"""Nodes of a graph through the same loop: the split, the mask of the loss, and where the error is taken."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import feedbackward as fb
from feedbackward.cli import main
from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment import nets
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.config.schema import Changes, TrainConfig
from feedbackward.experiment.data.nodes import LEFT_OUT, NodeLoader, load_graph
from feedbackward.experiment.tasks import TASKS
from feedbackward.experiment.training.run import Run

CPU = torch.device("cpu")
NODES, FEATURES = 90, 6
HAS_PYG = importlib.util.find_spec("torch_geometric") is not None
with_pyg = pytest.mark.skipif(not HAS_PYG, reason="needs torch_geometric")
torch.set_num_threads(1)


class Mean(nn.Module):
    """A linear layer, then the mean over a node and its neighbours."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.lin = nn.Linear(inputs, outputs)

    def forward(self, h, edges):
        h = self.lin(h)
        degree = torch.ones(len(h), dtype=h.dtype).index_add(
            0, edges[1], torch.ones(edges.shape[1], dtype=h.dtype)
        )
        return h.index_add(0, edges[1], h[edges[0]]) / degree.unsqueeze(1)


class Net(nn.Module):
    def __init__(self, in_shape, classes):
        super().__init__()
        self.first, self.act, self.head = Mean(in_shape[0], 8), nn.Tanh(), Mean(8, classes)

    def forward(self, h, edges):
        return self.head(self.act(self.first(h, edges)), edges)


def net(in_shape, classes):
    return Net(in_shape, classes)


def arrays(split=True):
    """Three rings of 30 nodes, whose features hint at the ring."""
    draw = np.random.RandomState(0)
    labels = np.arange(NODES) * 3 // NODES
    dense = draw.rand(NODES, FEATURES) * (draw.rand(NODES, FEATURES) < 0.5)
    dense[np.arange(NODES), labels] += 0.5
    row, column = dense.nonzero()
    around = (np.arange(NODES) + 1) % 30 + labels * 30
    edges = np.stack([np.arange(NODES), around])
    found = {
        "x_indptr": np.concatenate([[0], np.bincount(row, minlength=NODES).cumsum()]),
        "x_indices": column,
        "x_data": dense[row, column].astype(np.float32),
        "x_shape": np.array(dense.shape),
        "y": labels,
        "edge_index": np.concatenate([edges, edges[::-1]], 1),
    }
    order = draw.permutation(NODES)
    own = {"train": order[:15], "val": order[15:45], "test": order[45:]}
    return dense, found | (own if split else {})


@pytest.fixture
def file(tmp_path):
    np.savez(tmp_path / "rings.npz", **arrays()[1])
    return tmp_path / "rings.npz"


def config(file, **changes):
    given = {"task": "node_classification", "model": "test_nodes:net", "sites": ["act"]}
    data = DataConfig(name=str(file), train_limit=changes.pop("train_limit", None))
    return TrainConfig(**given | {"data": data, "threads": 1} | changes).resolved()


def test_the_file_as_it_is(file):
    data = load_graph(DataConfig(name=str(file)))
    dense, given = arrays()
    expected = dense / dense.sum(1, keepdims=True)
    torch.testing.assert_close(data.train.features, torch.from_numpy(expected).float())
    assert (data.shape, data.num_classes, data.note) == ((FEATURES,), 3, "")
    for ours, theirs in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert getattr(data, ours).index.tolist() == given[theirs].tolist()


def test_a_graph_without_a_split_gets_one(tmp_path):
    np.savez(tmp_path / "g.npz", **arrays(split=False)[1])
    data = load_graph(DataConfig(name=str(tmp_path / "g.npz")))
    assert data.train.labels[data.train.index].bincount().tolist() == [20, 20, 20]
    index = torch.cat([part.index for part in (data.train, data.validation, data.test)])
    assert index.sort().values.tolist() == list(range(NODES))
    assert "20240607" in data.note


def test_a_batch_is_the_graph_and_the_labels_of_its_nodes(file):
    data = load_graph(DataConfig(name=str(file)))
    (inputs, target), *more = NodeLoader(data.train, 1_000_000).epoch(0)
    assert not more
    assert inputs[0] is data.train.features
    kept = target != LEFT_OUT
    assert kept.nonzero().flatten().tolist() == sorted(data.train.index.tolist())
    assert torch.equal(target[kept], data.train.labels[kept])
    parts = [target for _, target in NodeLoader(data.train, 5, seed=1).epoch(0)]
    assert len(parts) == 3
    assert torch.equal(torch.stack(parts).max(0).values, target)


def test_loss_and_measures_are_of_the_nodes_with_a_loss():
    task = TASKS["node_classification"]
    output, target = torch.randn(6, 3), torch.tensor([0, LEFT_OUT, 2, LEFT_OUT, 1, 1])
    kept = [0, 2, 4, 5]
    naive = -sum(output[i].log_softmax(0)[target[i]].item() for i in kept)
    assert task.loss(output, target).item() == pytest.approx(naive / 4, rel=1e-6)
    assert task.loss(output, target, "sum").item() == pytest.approx(naive, rel=1e-6)
    assert task.hits(output, target) == sum(output[i].argmax() == target[i] for i in kept)
    assert task.count(target) == 4


@pytest.mark.parametrize("rule", ["bp", "dfa", "dkp", "dgl", "drtp", "frozen"])
def test_labels_behind_the_mask_change_nothing(rule, file):
    """Two graphs that differ in the labels of held-out nodes only give equal weights, bit for bit."""
    found = []
    for shift in (0, 1):
        chosen = config(file, rule=rule, epochs=3)
        data = load_graph(chosen.data)
        hidden = torch.ones(NODES, dtype=torch.bool).index_fill(0, data.train.index, False)
        data.train.labels[hidden] = (data.train.labels[hidden] + shift) % 3
        run = Run(chosen, data, CPU)
        for epoch in range(3):
            run.step(*next(run.loader.epoch(epoch)))
        found.append(run.learner.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_rows_without_a_loss_get_no_signal_and_the_error_may_be_taken_before_the_sum(file):
    """At the output only labelled nodes have an error; before the last mean their neighbours have one, that of backprop."""
    data = load_graph(DataConfig(name=str(file)))
    (inputs, target), *_ = NodeLoader(data.train, 1_000_000).epoch(0)
    inputs = (inputs[0].double(), inputs[1])
    labelled = target != LEFT_OUT
    near = labelled.clone()
    near[inputs[1][1][labelled[inputs[1][0]]]] = True
    for error_at, reached in ((None, labelled), ("head.lin", near)):
        torch.manual_seed(0)
        model = Net((FEATURES,), 3).double()
        learner = fb.attach(model, fb.DFA(), example=inputs, sites=["act"], error_at=error_at)
        (B,) = learner.feedback.buffers()
        signals = []

        def keep(_, __, output, kept=signals):
            output.register_hook(kept.append)

        handle = model.first.register_forward_hook(keep)
        F.cross_entropy(learner(*inputs), target).backward()
        handle.remove()
        assert torch.equal(signals[0].abs().sum(1) > 0, reached)
        with learner.exact():
            logits = learner(*inputs)
            h = torch.tanh(model.first(*inputs)).detach()
        logits = logits.detach().requires_grad_()
        (error,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
        if error_at:
            a = model.head.lin(h).detach().requires_grad_()
            degree = torch.bincount(inputs[1][1], minlength=NODES).double() + 1
            mean = a.index_add(0, inputs[1][1], a[inputs[1][0]]) / degree.unsqueeze(1)
            (error,) = torch.autograd.grad(mean, a, error)
        torch.testing.assert_close(signals[0], (error @ B) * (1 - h.square()))


@pytest.mark.parametrize("rule", ["bp", "dfa", "dkp", "dgl"])
def test_trains(rule, file):
    run = Run(
        config(file, rule=rule, forward=Changes(weight_decay=0.0)),
        load_graph(config(file).data),
        CPU,
    )
    for epoch in range(150):
        run.step(*next(run.loader.epoch(epoch)))
    assert run.position.seen == 150 * 15
    assert run.evaluate(run.data.test)["accuracy"] > 60


def test_evaluation_counts_each_node_once(file):
    run = Run(config(file, rule="bp"), load_graph(config(file).data), CPU)
    test = run.data.test
    with torch.no_grad():
        output = run.learner.model(test.features, test.edges)[test.index]
    labels = test.labels[test.index]
    found = run.evaluate(test)
    assert found["loss"] == pytest.approx(F.cross_entropy(output, labels).item(), rel=1e-5)
    right = (output.argmax(1) == labels).double().mean().item()
    assert found["accuracy"] == pytest.approx(100 * right)


def test_command(file, tmp_path, capsys):
    given = ["--task", "node_classification", "--data", str(file), "--model", "test_nodes:net"]
    given += ["--sites", "[act]", "--epochs", "2", "--threads", "1", "--no-tensorboard"]
    assert (
        main(["train", *given, "--rule", "dkp", "--probe-every", "1", "--out", str(tmp_path / "r")])
        == 0
    )
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert f"test accuracy {result['test_accuracy']:.2f} %, on nodes" in capsys.readouterr().out


def test_refused(file, tmp_path):
    with pytest.raises(ConfigError, match="for images"):
        load_graph(DataConfig(name=str(file), augment="flip"))
    with pytest.raises(ConfigError, match="for texts"):
        load_graph(DataConfig(name=str(file), context=4))
    with pytest.raises(ConfigError, match="data-root"):
        load_graph(DataConfig(name="cora"))
    with pytest.raises(DataError, match="no graph file"):
        load_graph(DataConfig(name="fashion-mini"))
    short = arrays()[1]
    np.savez(tmp_path / "short.npz", **short | {"y": short["y"][:-1]})
    with pytest.raises(DataError, match="do not fit"):
        load_graph(DataConfig(name=str(tmp_path / "short.npz")))
    del short["edge_index"]
    np.savez(tmp_path / "none.npz", **short)
    with pytest.raises(DataError, match="no array 'edge_index'"):
        load_graph(DataConfig(name=str(tmp_path / "none.npz")))
    with pytest.raises(ConfigError, match="gcn"):
        Run(config(file, model="gru"), load_graph(config(file).data), CPU)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    nets.graph._layers.cache_clear()
    with pytest.raises(ConfigError, match=r"feedbackward\[graphs\]"):
        nets.build("gcn", (5,), 3, task="node_classification")


@with_pyg
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcn", "gcn4", "gat", "sage", "gin"])
def test_nets_learn_by_the_mask(name, file):
    chosen = config(file, model=name, sites=None, rule="dkp", epochs=2)
    run = Run(chosen, load_graph(chosen.data), CPU)
    assert [site.name for site in run.learner.sites] == list(nets.default_sites(name))
    for epoch in range(2):
        run.step(*next(run.loader.epoch(epoch)))
    assert not run.learner.plan.unreached
    assert run.learner.model(run.data.train.features, run.data.train.edges).shape == (NODES, 3)
