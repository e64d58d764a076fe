"""A picture as a function, through the same loop: the split of its pixels, PSNR by its formula, and runs that go on."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from test_train import StopAfter

import feedbackward as fb
from feedbackward.cli import main
from feedbackward.errors import AttachError, ConfigError, DataError
from feedbackward.experiment import nets
from feedbackward.experiment.config.data import DataConfig
from feedbackward.experiment.config.schema import Changes, TrainConfig
from feedbackward.experiment.config.tasks import NLL, PSNR
from feedbackward.experiment.data.picture import drawn, load_picture
from feedbackward.experiment.grid.candidates import pick
from feedbackward.experiment.nets.field import Field
from feedbackward.experiment.report.summary import conclusion, summarise
from feedbackward.experiment.tasks import TASKS
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.experiment.training.progress import Progress
from feedbackward.experiment.training.run import Run
from feedbackward.experiment.training.train import train

CPU = torch.device("cpu")
TASK = TASKS["regression"]
torch.set_num_threads(1)


def small(in_shape, classes):
    return Field(in_shape, classes, frequencies=16, width=24, depth=3)


def config(**changes):
    data = DataConfig(name="picture", size=changes.pop("size", 16))
    given = {"task": "regression", "model": "test_picture:small", "data": data, "threads": 1}
    return TrainConfig(**given | {"batch_size": 32, "epochs": 4} | changes).resolved()


def test_every_pixel_is_in_one_split():
    data = load_picture(DataConfig(name="picture", size=16))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [128, 64, 64]
    places = torch.cat([part.inputs for part in (data.train, data.validation, data.test)])
    colours = torch.cat([part.targets for part in (data.train, data.validation, data.test)])
    rows, columns = ((places + 1) * 8).long().unbind(1)
    assert sorted((rows * 16 + columns).tolist()) == list(range(256))
    # the middle of the pixel in row r and column c is at (2 r + 1) / 16 - 1
    torch.testing.assert_close(places[:, 0], (2 * rows + 1) / 16 - 1)
    # less their mean over what is trained on
    mean = drawn(16)[rows[:128], columns[:128]].mean(0)
    torch.testing.assert_close(colours, drawn(16)[rows, columns] - mean)
    torch.testing.assert_close(torch.tensor(data.form["mean_colour"]), mean)


def test_the_picture_has_smooth_parts_and_edges():
    step = (drawn(64)[:, 1:] - drawn(64)[:, :-1]).abs().amax(-1)
    assert (step < 0.06).float().mean() > 0.8
    assert (step > 0.3).sum() > 64


def test_an_image_file(tmp_path):
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = load_picture(DataConfig(name=str(tmp_path / "a.png"), size=4))
    rows, columns = ((data.train.inputs + 1) * 2).long().unbind(1)
    mean = torch.from_numpy(pixels).float().unfold(0, 2, 2).unfold(1, 2, 2).mean((-1, -2)) / 255
    colours = data.train.targets + torch.tensor(data.form["mean_colour"])
    assert (colours - mean[rows, columns]).abs().max() <= 1 / 255


def test_signal_to_noise_by_its_formula():
    output, target = torch.rand(10, 3), torch.rand(10, 3)
    error = sum((output[n, c] - target[n, c]).item() ** 2 for n in range(10) for c in range(3)) / 30
    assert TASK.loss(output, target).item() == pytest.approx(error, rel=1e-5)
    assert TASK.loss(output, target, "sum").item() == pytest.approx(10 * error, rel=1e-5)
    assert TASK.measures(error, 0)["psnr"] == pytest.approx(10 * math.log10(1 / error))
    # errors of a tenth of the range are 20 dB below it
    assert TASK.measures(0.01, 0)["psnr"] == pytest.approx(20)
    assert TASK.count(target) == 10


def test_guessing_is_the_mean_colour():
    data = load_picture(DataConfig(name="picture", size=16))
    colours = data.train.targets
    mean = colours.mean(0).expand_as(colours)
    assert TASK.guess(data) == pytest.approx(TASK.loss(mean, colours).item(), rel=1e-5)


@pytest.mark.parametrize("rule", ["bp", "dfa", "dkp", "kp"])
def test_trains(rule):
    """Every rule is better than the mean colour."""
    chosen = config(rule=rule, epochs=40, forward=Changes(lr=0.01))
    run = Run(chosen, load_picture(chosen.data), CPU)
    for epoch in range(40):
        for batch in run.loader.epoch(epoch):
            run.step(*batch)
    assert run.evaluate(run.data.train)["loss"] < TASK.guess(run.data)


def test_evaluation_is_that_of_the_whole_split_at_once():
    run = Run(config(rule="bp"), load_picture(config().data), CPU)
    split = run.data.test
    with torch.no_grad():
        error = (run.learner.model(split.inputs) - split.targets).square().mean().item()
    assert run.evaluate(split)["psnr"] == pytest.approx(-10 * math.log10(error), rel=1e-5)


class Quiet(Progress):
    def __init__(self):
        super().__init__(Console(quiet=True))


TASK_DATA = [
    ("regression", "test_picture:small", "picture", None),
    ("node_classification", "test_nodes:net", "rings.npz", ["act"]),
    ("music", "test_music:steps", "music-walk.npz", ["layers.0.steps.0", "layers.1.steps.0"]),
]


@pytest.mark.parametrize(("task", "model", "data", "sites"), TASK_DATA)
def test_a_run_that_was_stopped_ends_in_the_same_bits(task, model, data, sites, tmp_path, request):
    if task != "regression":
        request.getfixturevalue("written")
        data = str(tmp_path / data)
    size = 8 if task == "regression" else None

    def run(out, checks=None, resume=False):
        chosen = TrainConfig(
            task=task,
            model=model,
            sites=sites,
            data=DataConfig(name=data, size=size),
            rule="dkp",
            epochs=3,
            batch_size=5,
            threads=1,
            tensorboard=False,
            out=str(tmp_path / out),
            resume=resume,
        )
        with Quiet() as progress, StopAfter(checks) if checks else Interrupts() as interrupts:
            return train(chosen, progress, interrupts)

    whole = run("whole")
    stops, checks = 0, 2
    while True:
        try:
            broken = run("broken", checks, resume=stops > 0)
            break
        except InterruptedRunError:
            stops += 1
            checks += 1
    assert stops > 1
    measure = TASKS[task].kind.measure.key
    assert broken[f"test_{measure}"] == whole[f"test_{measure}"]
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def written(tmp_path):
    """The files of the other tasks' tests."""
    from test_music import rolls
    from test_nodes import arrays

    np.savez(tmp_path / "rings.npz", **arrays()[1])
    found = {}
    for split, pieces in rolls().items():
        found[split] = np.packbits(np.concatenate(pieces), axis=1)
        found[f"{split}_len"] = np.array([len(piece) for piece in pieces])
    np.savez(tmp_path / "music-walk.npz", **found)


def test_command(tmp_path, capsys):
    given = ["--task", "regression", "--data", "picture", "--data.size", "16", "--threads", "1"]
    given += ["--model", "test_picture:small", "--epochs", "2", "--no-tensorboard"]
    assert main(["train", *given, "--rule", "dkp", "--out", str(tmp_path / "one")]) == 0
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    assert result["test_psnr"] == pytest.approx(-10 * math.log10(result["test_loss"]))
    card = (tmp_path / "one" / "README.md").read_text()
    assert "answers with a colour from 0 to 1 less the mean [" in card
    assert f"test PSNR {result['test_psnr']:.2f} dB" in capsys.readouterr().out
    given += ["--rules", "bp,dgl,frozen", "--seeds", "0,1", "--workers", "1", "--timing-steps", "0"]
    assert main(["compare", *given, "--out", str(tmp_path / "two"), "--probe-every", "0"]) != 2
    report = (tmp_path / "two" / "report.md").read_text()
    assert "Test PSNR (dB)" in report
    assert "DGL learns from classes" in report


def _rule(name, key, values):
    runs = [
        {"seed": s, "status": "done", "measure": key, f"test_{key}": v}
        for s, v in enumerate(values)
    ]
    return {"rule": name, "label": name.upper(), "runs": runs}


@pytest.mark.parametrize(("key", "sign"), [("psnr", 1), ("nll", -1)])
def test_more_decibels_and_less_likelihood_lost_are_better(key, sign):
    values = ([30, 31, 32.2], [29, 30, 31])
    bp, dkp = (
        _rule(n, key, [sign * v + 100 for v in vs])
        for n, vs in zip(("bp", "dkp"), values, strict=True)
    )
    results = {"version": 1, "rules": [bp, dkp], "sites": []}
    assert summarise(results)[1]["gap"]["mean"] == pytest.approx(3.2 / 3)
    unit = {"psnr": " dB", "nll": " nats"}[key]
    assert f"gap 1.07 ± 0.07{unit}" in conclusion(results)
    trials = [
        {"lr": lr, "feedback_lr": None, "measure": key, f"validation_{key}": sign * v}
        for lr, v in ((1.0, 3.0), (2.0, 5.0), (3.0, 4.0))
    ]
    assert pick(trials, "X") == (2.0, None)


def test_measures_in_words():
    assert PSNR.in_words(28.456) == "28.46 dB"
    assert NLL.in_words(8.5) == "8.50 nats"
    assert (PSNR.points, NLL.heading) == (" dB", "Test NLL (nats)")


def test_default_net_has_a_site_below_every_layer():
    model = nets.build("field", (2,), 3, task="regression")
    learner = fb.attach(model, fb.DFA(), example=torch.rand(5, 2))
    assert [tuple(B.shape) for B in learner.feedback.buffers()] == [(3, 128)] * 3
    assert not learner.plan.unreached


def test_refused(tmp_path):
    with pytest.raises(ConfigError, match="'picture', which is embedded"):
        load_picture(DataConfig())
    with pytest.raises(ConfigError, match="for images"):
        load_picture(DataConfig(name="picture", augment="flip"))
    with pytest.raises(ConfigError, match="at least 4"):
        load_picture(DataConfig(name="picture", size=2))
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DataError, match="cannot read the image"):
        load_picture(DataConfig(name=str(tmp_path / "a.png")))
    with pytest.raises(AttachError, match="DGL learns from classes"):
        Run(config(rule="dgl"), load_picture(config().data), CPU)
