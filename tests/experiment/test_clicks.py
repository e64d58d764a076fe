"""Clicks through the same loop: numbers of values, the best log loss, the ROC curve's area, DeepFM by its formula."""

import json
import math

import numpy as np
import pytest
import torch

from feedbackward.cli import main
from feedbackward.errors import ConfigError, DataError
from feedbackward.experiment import nets
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.config.schema import Changes, TrainConfig
from feedbackward.experiment.config.tasks import LOG_LOSS
from feedbackward.experiment.data.clicks import COUNT, FIELDS, area, drawn, load_clicks
from feedbackward.experiment.nets.deepfm import DeepFM
from feedbackward.experiment.tasks import TASKS
from feedbackward.experiment.training.run import Run

CPU = torch.device("cpu")
TASK = TASKS["recommendation"]
torch.set_num_threads(1)


def small(in_shape, classes):
    return DeepFM(in_shape, classes, width=4, hidden=(8, 8))


@pytest.fixture
def written(tmp_path):
    """A file of clicks that depend on whether two fields agree; its path, fields and clicks."""
    random = np.random.RandomState(0)
    fields = random.randint(4, size=(400, 3))
    clicks = (fields[:, 0] == fields[:, 1]).astype(np.int8)
    path = tmp_path / "clicks.npz"
    np.savez(path, fields=fields, clicks=clicks)
    return str(path), fields, clicks


def config(path, **changes):
    given = {"task": "recommendation", "model": "test_clicks:small", "sites": "layers"}
    given |= {"data": DataConfig(name=path), "threads": 1, "batch_size": 20, "epochs": 2}
    return TrainConfig(**given | changes).resolved()


def test_values_are_numbered_over_all_fields(written):
    path, fields, clicks = written
    data = load_clicks(DataConfig(name=path))
    parts = (data.train, data.validation, data.test)
    assert [len(part) for part in parts] == [250, 50, 100]
    inputs = torch.cat([part.inputs for part in parts])
    assert inputs.min(0).values.tolist() == data.form["first_value"] == [0, 4, 8]
    assert data.shape == (3, 12)
    rows = torch.cat(
        [inputs - torch.tensor([0, 4, 8]), *[torch.cat([p.targets for p in parts])[:, None]]], 1
    )
    expected = np.concatenate([fields, clicks[:, None]], 1)
    assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_nobody_does_better_than_the_probabilities_of_the_draw():
    """The note's log loss and area are those of the probabilities; other probabilities have a higher loss."""
    fields, _, chance = drawn()
    assert fields.shape == (COUNT, len(FIELDS))
    assert (fields.max(0) + 1).tolist() == list(FIELDS.values())
    data = load_clicks(DataConfig(name="clicks"))
    sizes = list(FIELDS.values())
    starts = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])
    of = {tuple(row): p for row, p in zip(fields.tolist(), chance.tolist(), strict=True)}
    p = torch.tensor([of[tuple(row)] for row in (data.test.inputs - starts).tolist()]).double()
    y = data.test.targets

    def loss(p):
        return -torch.where(y > 0, p.log(), (1 - p).log()).mean().item()

    assert f"a log loss of {loss(p):.4f} and an AUC of {area(p, y):.4f}" in data.note
    odds = p.logit()
    assert loss(p) < min(loss((odds * factor).sigmoid()) for factor in (0.9, 1.1))
    assert loss(p) < min(loss((odds + shift).sigmoid()) for shift in (-0.1, 0.1))


def test_the_area_counts_pairs():
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randint(6, (15,), generator=random).float()
        clicks = torch.randint(2, (15,), generator=random)
        pairs = [
            (a > b).float() + 0.5 * (a == b).float()
            for a in scores[clicks > 0]
            for b in scores[clicks == 0]
        ]
        assert area(scores, clicks) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(area(torch.rand(3), torch.ones(3)))


def test_guessing_is_the_share_of_clicks(written):
    data = load_clicks(DataConfig(name=written[0]))
    y = data.train.targets
    share = y.double().mean()
    scores = torch.stack([(1 - share).log(), share.log()]).expand(len(y), 2)
    assert TASK.guess(data) == pytest.approx(TASK.loss(scores, y).item(), rel=1e-5)


def test_deepfm_by_its_formula():
    net = DeepFM((3, 7), 2, width=4, hidden=(5, 6)).double()
    torch.nn.init.normal_(net.bias.weight)
    row = [2, 4, 6]
    v = [net.embed.weight[i] for i in row]
    odds = sum(net.bias.weight[i, 0] for i in row)
    odds = odds + sum(v[f] @ v[g] for f in range(3) for g in range(f + 1, 3))
    h = torch.cat(v)
    for layer in (net.block1.fc, net.block2.fc):
        h = (layer.weight @ h + layer.bias).clamp_min(0)
    scores = net.head.weight @ h + net.head.bias
    expected = torch.stack([scores[0], scores[1] + odds])
    torch.testing.assert_close(net(torch.tensor([row]))[0], expected)


@pytest.mark.parametrize("rule", ["bp", "dfa", "dkp", "kp", "dgl"])
def test_trains(rule, written):
    """Pairs of fields that agree are learned by every rule."""
    chosen = config(written[0], rule=rule, epochs=10, forward=Changes(lr=0.03))
    run = Run(chosen, load_clicks(chosen.data), CPU)
    for epoch in range(run.epochs):
        for batch in run.loader.epoch(epoch):
            run.step(*batch)
    found = run.evaluate(run.data.test)
    assert found["log_loss"] < TASK.guess(run.data)
    assert found["auc"] > 0.8


def test_evaluation_is_that_of_the_whole_split_at_once():
    data = DataConfig(name="clicks", train_limit=100, test_limit=9_000)
    run = Run(config("clicks", data=data), load_clicks(data), CPU)
    split = run.data.test
    with torch.no_grad():
        scores = run.learner.model(split.inputs)
    found = run.evaluate(split)
    assert found["auc"] == pytest.approx(area(scores[:, 1] - scores[:, 0], split.targets), abs=1e-6)
    assert found["log_loss"] == pytest.approx(TASK.loss(scores, split.targets).item(), rel=1e-5)


def test_less_is_better():
    assert LOG_LOSS.falls
    assert LOG_LOSS.in_words(0.4, 2, named=True) == "log loss 0.4000 nats"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"fields": np.zeros((4, 2))}, "has no array 'clicks'"),
        ({"fields": np.zeros((9, 2)), "clicks": np.zeros(9)}, "must be integers from 0"),
        ({"fields": -np.ones((9, 2), int), "clicks": np.zeros(9)}, "must be integers from 0"),
        ({"fields": np.ones((9, 2), int), "clicks": np.full(9, 2)}, "clicks 0 or 1"),
        ({"fields": np.ones((9, 2), int), "clicks": np.zeros(8)}, "do not fit"),
        ({"fields": np.ones((0, 2), int), "clicks": np.zeros(0)}, "do not fit"),
        ({"fields": np.full((9, 2), 10**12), "clicks": np.zeros(9)}, "from 0: np.unique"),
        ({"fields": np.full((9, 2), 2**64 - 1, np.uint64), "clicks": np.zeros(9)}, "np.unique"),
    ],
)
def test_files_that_do_not_fit_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_clicks(DataConfig(name=str(tmp_path / "bad.npz")))


def test_too_few_rows_are_refused(tmp_path):
    np.savez(tmp_path / "few.npz", fields=np.ones((7, 2), int), clicks=np.ones(7))
    with pytest.raises(ConfigError, match=r"a split of .* has no rows"):
        load_clicks(DataConfig(name=str(tmp_path / "few.npz")))
    with pytest.raises(ConfigError, match=r"data\.context is for texts, sentences and music"):
        load_clicks(DataConfig(name="clicks", context=3))


def test_command(written, tmp_path, capsys):
    given = ["--task", "recommendation", "--data", written[0], "--model", "deepfm"]
    given += ["--threads", "1", "--epochs", "2", "--no-tensorboard"]
    assert main(["train", *given, "--rule", "dkp", "--out", str(tmp_path / "one")]) == 0
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    assert result["test_log_loss"] == result["test_loss"]
    assert 0 <= result["test_auc"] <= 1
    assert f"test log loss {result['test_loss']:.4f} nats" in capsys.readouterr().out
    given += ["--rules", "bp,frozen", "--seeds", "0,1", "--workers", "1", "--timing-steps", "0"]
    assert main(["compare", *given, "--out", str(tmp_path / "two"), "--probe-every", "0"]) != 2
    assert "Test log loss (nats)" in (tmp_path / "two" / "report.md").read_text()


def test_nets_for_it():
    assert nets.build("deepfm", (3, 9), 2, task="recommendation")(
        torch.zeros(4, 3).long()
    ).shape == (4, 2)
    with pytest.raises(ConfigError, match="choose deepfm"):
        nets.build("vgg6", (3, 9), 2, task="recommendation")


def test_area_of_many_rows_is_exact():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randperm(300_000, generator=draw)
    clicks = torch.randint(2, scores.shape, generator=draw)
    order = clicks[scores.argsort()].tolist()
    # of every click, how many of the others have a lower score, in whole numbers
    lower = pairs = 0
    for click in order:
        lower, pairs = lower + (not click), pairs + click * lower
    assert area(scores, clicks) == pytest.approx(pairs / (lower * sum(order)), rel=1e-12)
