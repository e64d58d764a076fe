"""Music through the same loop: pieces of many lengths, the likelihood of a frame, and padding that changes nothing."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import feedbackward as fb
from feedbackward.cli import main
from feedbackward.errors import AttachError, ConfigError, DataError
from feedbackward.experiment import nets
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.config.schema import Changes, TrainConfig
from feedbackward.experiment.data.music import KEYS, PADDING, PieceLoader, load_music
from feedbackward.experiment.nets.recurrent import Recurrent
from feedbackward.experiment.tasks import TASKS
from feedbackward.experiment.training.run import Run

CPU = torch.device("cpu")
LENGTHS = {"train": [9, 5, 1, 12, 7, 6], "valid": [8, 4], "test": [6, 10, 3]}
TASK = TASKS["music"]
torch.set_num_threads(1)


def layers(in_shape, classes):
    return Recurrent(in_shape, classes, width=12, frames=True)


def steps(in_shape, classes):
    return Recurrent(in_shape, classes, width=12, frames=True, steps=True)


def rolls():
    """Two notes that walk up the keys, one from frame to frame."""
    found = {}
    for split, lengths in LENGTHS.items():
        pieces = []
        for i, length in enumerate(lengths):
            piece = np.zeros((length, KEYS), np.uint8)
            for t in range(length):
                piece[t, [(3 * i + t) % 12, 20 + (3 * i + t) % 12]] = 1
            pieces.append(piece)
        found[split] = pieces
    return found


@pytest.fixture
def file(tmp_path):
    arrays = {}
    for split, pieces in rolls().items():
        arrays[split] = np.packbits(np.concatenate(pieces), axis=1)
        arrays[f"{split}_len"] = np.array([len(piece) for piece in pieces])
    np.savez(tmp_path / "music-walk.npz", **arrays)
    return tmp_path / "music-walk.npz"


def config(file, **changes):
    data = DataConfig(name=str(file), context=changes.pop("context", None))
    given = {"task": "music", "model": "test_music:layers", "sites": ["layers.0", "layers.1"]}
    return TrainConfig(**given | {"data": data, "threads": 1, "batch_size": 3} | changes).resolved()


def test_pieces_are_those_of_the_file(file):
    data = load_music(DataConfig(name=str(file)))
    assert (data.name, data.shape, data.num_classes) == ("walk", (88,), 88)
    for ours, theirs in (("train", "train"), ("validation", "valid"), ("test", "test")):
        expected = [piece for piece in rolls()[theirs] if len(piece) > 1]
        split = getattr(data, ours)
        assert len(split) == len(expected)
        for i, piece in enumerate(expected):
            assert np.array_equal(split.piece(i).numpy(), piece)


def test_parts_predict_every_frame_but_the_first_once(file):
    data = load_music(DataConfig(name=str(file), context=4))
    first = rolls()["train"][0]
    parts = [data.train.piece(i).numpy() for i in range(2)]
    assert [len(part) for part in parts] == [5, 5]
    assert np.array_equal(np.concatenate([part[1:] for part in parts]), first[1:])
    targets = sum(len(data.train.piece(i)) - 1 for i in range(len(data.train)))
    assert targets == sum(length - 1 for length in LENGTHS["train"])


def test_batches_end_in_padding(file):
    data = load_music(DataConfig(name=str(file)))
    (inputs, targets), *_ = PieceLoader(data.test, 3, shuffle=False).epoch(0)
    assert inputs.shape == targets.shape == (3, 9, 88)
    for row, piece in enumerate(rolls()["test"]):
        known = len(piece) - 1
        assert np.array_equal(inputs[row, :known].numpy(), piece[:-1])
        assert np.array_equal(targets[row, :known].numpy(), piece[1:])
        assert (targets[row, known:] == PADDING).all()
        assert not inputs[row, known:].any()


def test_likelihood_of_a_frame():
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    target = torch.randint(2, (2, 3, 4)).double()
    target[1, 1:] = PADDING
    p = logits.float().sigmoid().double()
    there = [(0, 0), (0, 1), (0, 2), (1, 0)]
    naive = -sum(
        (p[n, t, k] if target[n, t, k] else 1 - p[n, t, k]).log().item()
        for n, t in there
        for k in range(4)
    )
    assert TASK.loss(logits, target, "sum").item() == pytest.approx(naive, rel=1e-5)
    assert TASK.loss(logits, target).item() == pytest.approx(naive / 4, rel=1e-5)
    assert TASK.count(target) == 4
    assert TASK.measures(8.5, 0.0) == {"loss": 8.5, "nll": 8.5}


@pytest.mark.parametrize("net", [layers, steps])
@pytest.mark.parametrize("rule", ["dfa", "bp"])
def test_longer_padding_changes_no_gradient(net, rule):
    """The gradient of a batch is that of its pieces one by one, weighted by their frames."""
    torch.manual_seed(0)
    model = net((KEYS,), KEYS).double()
    sites = ["layers.0", "layers.1"] if net is layers else ["layers.0.steps.0", "layers.1.steps.0"]
    x = torch.randint(2, (2, 7, KEYS)).double()
    y = torch.randint(2, (2, 7, KEYS)).double()
    x[1, 4:], y[1, 4:] = 0, PADDING
    learner = fb.attach(model, rule, example=x, sites=sites)

    def gradients(given, target):
        model.zero_grad()
        TASK.loss(learner(given), target, "sum").backward()
        return [p.grad.clone() for p in model.parameters()]

    whole = gradients(x, y)
    long = gradients(
        *(
            torch.cat([t, fill * torch.ones(2, 5, KEYS).double()], 1)
            for t, fill in ((x, 0), (y, PADDING))
        )
    )
    alone = zip(gradients(x[:1], y[:1]), gradients(x[1:, :4], y[1:, :4]), strict=True)
    for a, b, (first, second) in zip(whole, long, alone, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, first + second)


@pytest.mark.parametrize("rule", [fb.DFA(), fb.DKP()], ids=lambda rule: rule.name)
def test_padded_steps_get_no_signal(rule):
    torch.manual_seed(0)
    model = steps((KEYS,), KEYS)
    x = torch.randint(2, (3, 6, KEYS)).float()
    y = torch.randint(2, (3, 6, KEYS)).float()
    y[1, 4:], y[2, 2:] = PADDING, PADDING
    learner = fb.attach(model, rule, example=x, sites=["layers.0.steps.0", "layers.1.steps.0"])
    # B of DKP begins at zero: after an update it sends
    for p in learner.feedback.parameters():
        nn.init.normal_(p)
    signals = []

    def keep(module, given, output):
        output.register_hook(signals.append)

    learner.model.embed.register_forward_hook(keep)
    TASK.loss(learner(x), y).backward()
    reached = signals[0].abs().sum(-1) > 0
    assert torch.equal(reached, y[..., 0] >= 0)


def test_a_batch_may_be_longer_than_the_example(file):
    chosen = config(file, model="test_music:steps", sites=["layers.0.steps.0"], rule="dkp")
    run = Run(chosen, load_music(chosen.data), CPU)
    for length in (3, 20):
        x = torch.randint(2, (2, length, KEYS)).float()
        run.step(x, x)


@pytest.mark.parametrize(
    ("model", "sites"),
    [("layers", ["layers.0", "layers.1"]), ("steps", ["layers.0.steps.0", "layers.1.steps.0"])],
)
@pytest.mark.parametrize("rule", ["bp", "dfa", "dkp", "frozen"])
def test_trains(rule, model, sites, file):
    """Every rule learns at least which keys are used; a guess has 88 log 2 = 61 nats."""
    chosen = config(
        file,
        rule=rule,
        model=f"test_music:{model}",
        sites=sites,
        forward=Changes(lr=0.05, schedule="constant"),
    )
    run = Run(chosen, load_music(chosen.data), CPU)
    for epoch in range(25):
        for batch in run.loader.epoch(epoch):
            run.step(*batch)
    assert run.position.seen == 25 * sum(n - 1 for n in LENGTHS["train"])
    assert run.evaluate(run.data.test)["nll"] < 14


def test_evaluation_is_per_frame_over_all_pieces(file):
    run = Run(config(file, rule="bp"), load_music(config(file).data), CPU)
    total = 0.0
    with torch.no_grad():
        for piece in rolls()["test"]:
            frames = torch.from_numpy(piece).float().unsqueeze(0)
            logits = run.learner.model(frames[:, :-1])
            total += nn.functional.binary_cross_entropy_with_logits(
                logits, frames[:, 1:], reduction="sum"
            ).item()
    found = run.evaluate(run.data.test)
    assert found["nll"] == pytest.approx(total / (5 + 9 + 2), rel=1e-5)


def test_command(file, tmp_path, capsys):
    given = ["--task", "music", "--data", str(file), "--model", "music_rnn_steps", "--rule", "dfa"]
    given += ["--epochs", "1", "--threads", "1", "--no-tensorboard", "--out", str(tmp_path / "r")]
    assert main(["train", *given]) == 0
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["test_nll"] == result["test_loss"]
    assert f"test NLL {result['test_nll']:.2f} nats" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_both_granularities_are_one_net(kind):
    """Equal keys and outputs; one has a site per layer, the other one for every step."""
    x = torch.randint(2, (2, 5, KEYS)).float()
    models = []
    for name in (f"music_{kind}", f"music_{kind}_steps"):
        torch.manual_seed(0)
        models.append(nets.build(name, (KEYS,), KEYS, task="music"))
    whole, stepwise = models
    assert list(whole.state_dict()) == list(stepwise.state_dict())
    torch.testing.assert_close(whole(x), stepwise(x))
    for name, model in zip((f"music_{kind}", f"music_{kind}_steps"), models, strict=True):
        learner = fb.attach(model, fb.DKP(), example=x, sites=nets.default_sites(name))
        assert len(learner.sites) == 1
        assert not learner.plan.unreached


def test_refused(file, tmp_path):
    with pytest.raises(ConfigError, match="for images"):
        load_music(DataConfig(name=str(file), size=8))
    with pytest.raises(ConfigError, match="at least 1"):
        load_music(DataConfig(name=str(file), context=0))
    with pytest.raises(ConfigError, match="data-root"):
        load_music(DataConfig(name="jsb-chorales"))
    with pytest.raises(AttachError, match=r"DGL.*music.*dfa"):
        Run(config(file, rule="dgl"), load_music(config(file).data), CPU)
    with np.load(file) as arrays:
        broken = dict(arrays)
    broken["train_len"] = broken["train_len"] + 1
    np.savez(tmp_path / "broken.npz", **broken)
    with pytest.raises(DataError, match="'train' of"):
        load_music(DataConfig(name=str(tmp_path / "broken.npz")))
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(DataError, match="cannot read"):
        load_music(DataConfig(name=str(tmp_path / "text.npz")))
