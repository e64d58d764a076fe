"""The training loop: exact resumption, interruption, divergence and export."""

import json
import math
import signal
import warnings
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import feedbackward as fb
from feedbackward.errors import CheckpointError, ConfigError, DivergenceError
from feedbackward.experiment.config.recipes import find_recipe
from feedbackward.experiment.config.schema import Changes, TrainConfig
from feedbackward.experiment.data.dataset import DataConfig, load_data
from feedbackward.experiment.training import checkpoint
from feedbackward.experiment.training import train as train_module
from feedbackward.experiment.training.diagnose import first_non_finite
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.experiment.training.progress import Progress
from feedbackward.experiment.training.runfolder import RunFolder

DATA = DataConfig(train_limit=72, validation=40, size=8, classes=3, augment="crop-flip")
CPU = torch.device("cpu")
torch.set_num_threads(1)  # the nets are tiny: threads would only wait for each other


class Net(nn.Sequential):
    """Batch norm, dropout and a tied weight: all that a resumed run must restore."""

    def __init__(self, in_shape=(1, 8, 8), classes=3):
        layers = [
            nn.Conv2d(in_shape[0], 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
        ]
        layers += [nn.Linear(4 * 36, 12), nn.Tanh(), nn.Linear(12, classes)]
        super().__init__(*layers)


def wide(in_shape):
    """More classes than the data has."""
    return Net(in_shape, classes=5)


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self, classes):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)
        self.flat, self.head = nn.Flatten(), nn.Linear(64, classes)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.act(self.first(self.flat(x)))))


class Exploding(nn.Module):
    """Its middle layer gives NaN once ten batches were seen."""

    def __init__(self, classes=3):
        super().__init__()
        self.flat, self.first, self.middle = nn.Flatten(), nn.Linear(64, 8), nn.Tanh()
        self.broken, self.head = Broken(), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.broken(self.middle(self.first(self.flat(x)))))


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += self.training
        return x * (math.nan if self.seen > 10 else 1.0)


class StopAfter(Interrupts):
    """A Ctrl-C that comes at the given check."""

    def __init__(self, checks):
        super().__init__()
        self.left = checks

    def check(self):
        self.left -= 1
        if self.left < 0:
            raise InterruptedRunError(signal.SIGINT)


def config(tmp_path, name="run", **changes):
    base = TrainConfig(
        model=f"{__name__}:Net", data=DATA, epochs=3, batch_size=16, seed=3, probe_every=1, probe_images=20,
        tensorboard=False, out=str(tmp_path / name),
    )  # fmt: skip
    return replace(base, **changes)


def run(settings, interrupts=None):
    with Progress(Console(quiet=True)) as progress:
        return train_module.train(settings, progress, interrupts or Interrupts())


def record(folder):
    """The metrics without what a clock says."""
    clocks = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in clocks} for row in RunFolder(folder).rows()]


def assert_same_run(one, other):
    first, second = (checkpoint.load(folder / "checkpoint.safetensors") for folder in (one, other))
    for state in (first, second):
        state["position"].pop("seconds")
        state["position"].pop("epoch_seconds")
    assert equal(first, second)
    assert record(one) == record(other)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("recipe", ["default", "published"])
@pytest.mark.parametrize("checks", [4, 5])
def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path, recipe, checks):
    """Stopped again and again, in mid-epoch, in evaluation and between epochs: every bit is the same."""
    run(config(tmp_path, "whole", recipe=recipe))
    broken = config(tmp_path, "broken", recipe=recipe)
    stops = 0
    while stops < 20:
        try:
            run(broken, StopAfter(checks))
            break
        except InterruptedRunError:
            stops += 1
            broken = replace(broken, resume=True)
            torch.rand(3)  # another process would have another random state
    assert stops >= 2
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_run_that_was_killed_loses_what_came_after_its_checkpoint(tmp_path):
    run(config(tmp_path, "whole"))
    with pytest.raises(InterruptedRunError):
        run(config(tmp_path, "killed"), StopAfter(9))
    folder = RunFolder(tmp_path / "killed")
    with folder.metrics.open(
        "a"
    ) as file:  # written after the checkpoint, the last line cut off by the crash
        file.write(
            json.dumps({"kind": "probe", "epoch": 2, "sites": {}, "parameters": {}})
            + '\n{"kind": "ep'
        )
    run(config(tmp_path, "killed", resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    RunFolder.claim(config(tmp_path).resolved()).close()
    assert run(config(tmp_path, resume=True))["status"] == "done"


def test_dropout_and_order_differ_between_seeds_only(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(config(tmp_path, name, seed=seed, epochs=1))
    assert record(tmp_path / "a") == record(tmp_path / "b") != record(tmp_path / "c")


def test_the_record_and_the_exported_weights(tmp_path):
    result = run(config(tmp_path))
    rows = RunFolder(tmp_path / "run").rows()
    assert [(row["kind"], row["epoch"]) for row in rows] == [
        ("probe", 0), ("epoch", 1), ("probe", 1), ("epoch", 2), ("probe", 2), ("epoch", 3), ("probe", 3),
    ]  # fmt: skip
    model = Net()
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    data = load_data(DATA)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    with torch.no_grad():
        logits = model.eval()((data.test.images.float() / 255 - mean) / std)
    correct = (logits.argmax(1) == data.test.labels).double().mean().item()
    assert result["test_accuracy"] == pytest.approx(100 * correct)


def test_a_tied_weight_is_exported_under_both_names(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(config(tmp_path, model=f"{__name__}:Tied", epochs=1, sites=["act"]))
    found = load_file(tmp_path / "run" / "model.safetensors")
    Tied(3).load_state_dict(found)
    assert torch.equal(found["first.weight"], found["second.weight"])


def test_probing_changes_nothing(tmp_path):
    run(config(tmp_path, "with", probe_every=1, epochs=2))
    run(config(tmp_path, "without", probe_every=0, epochs=2))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("with", "without")]
    assert equal(*weights)


@pytest.mark.parametrize(
    "changes", [{"precision": "bf16"}, {"precision": "fp16"}, {"channels_last": True}]
)
def test_precision_and_memory_format_train_and_resume(tmp_path, changes):
    run(config(tmp_path, "whole", **changes))
    broken = config(tmp_path, "broken", **changes)
    with pytest.raises(InterruptedRunError):
        run(broken, StopAfter(7))
    run(replace(broken, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_nan_stops_the_run_naming_the_layer_and_keeps_the_last_checkpoint(tmp_path):
    settings = config(
        tmp_path, model=f"{__name__}:Exploding", probe_every=0
    )  # five batches an epoch
    with pytest.raises(
        DivergenceError, match=r"epoch 3, batch 1: .* output of the layer 'broken'; lower"
    ) as caught:
        run(settings)
    assert "checkpoint.safetensors" in str(caught.value)
    state = checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
    assert state["position"]["epoch"] == 2
    assert all(t.isfinite().all() for t in state["model"].values())
    with pytest.raises(DivergenceError, match="'broken'"):  # it would only diverge again
        run(replace(settings, resume=True))


def test_what_is_not_finite_is_named():
    learner = fb.attach(Net(), fb.DKP.published(), example=torch.randn(4, 1, 8, 8))
    x = torch.randn(4, 1, 8, 8)
    assert first_non_finite(learner, x / 0) == "the inputs hold it"
    assert "loss itself" in first_non_finite(learner, x)
    with torch.no_grad():
        learner.model[5].weight[0, 0] = math.inf
    assert "the parameter '5.weight' non-finite" in first_non_finite(learner, x)
    learner = fb.attach(Net(), fb.DKP.published(), example=x)
    with torch.no_grad():
        next(learner.feedback.parameters()).fill_(math.nan)
    assert f"the feedback weights of site '{learner.sites[0].name}'" in first_non_finite(learner, x)


def test_an_exploding_rate_is_told(tmp_path):
    wild = Changes(lr=1e30, schedule="constant")
    own = find_recipe("default").rates["dkp"].feedback_lr
    with pytest.raises(
        DivergenceError, match=rf"--forward.lr \(now 1e\+30\) or --feedback.lr \(now {own}\)"
    ):
        run(config(tmp_path, forward=wild, probe_every=0))
    assert RunFolder(tmp_path / "run").result()["status"] == "diverged"


def test_a_folder_is_never_overwritten_unasked(tmp_path):
    settings = config(tmp_path, epochs=1, probe_every=0)
    with pytest.raises(InterruptedRunError):
        run(settings, StopAfter(2))
    with pytest.raises(ConfigError, match="unfinished run: give --resume to go on, --overwrite"):
        run(settings)
    with pytest.raises(ConfigError, match=r"another config \(seed: 3 -> 4\)"):
        run(replace(settings, seed=4, resume=True))
    with pytest.raises(ConfigError, match="give one of them"):
        run(replace(settings, resume=True, overwrite=True))
    first = run(replace(settings, resume=True))
    with pytest.raises(ConfigError, match="holds a finished run: give --overwrite"):
        run(settings)
    assert run(replace(settings, resume=True)) == first
    run(replace(settings, seed=4, overwrite=True))
    assert RunFolder(tmp_path / "run").config().seed == 4


def test_foreign_used_and_unwritable_folders_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(ConfigError, match="not the folder of a run"):
        run(config(tmp_path, "photos", overwrite=True))
    assert (tmp_path / "photos" / "a.jpg").exists()
    with pytest.raises(ConfigError, match="cannot be written"):
        run(config(tmp_path, "photos/a.jpg/run"))
    held = RunFolder.claim(config(tmp_path).resolved())
    with pytest.raises(ConfigError, match="another process is training"):
        run(config(tmp_path, resume=True))
    held.close()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run(config(tmp_path, "mlp", model="mlp", epochs=1, probe_every=0))
    with pytest.raises(InterruptedRunError):
        run(config(tmp_path), StopAfter(5))
    (tmp_path / "mlp" / "checkpoint.safetensors").replace(
        tmp_path / "run" / "checkpoint.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"was saved under other settings \(model: mlp -> test_train:Net"
    ):
        run(config(tmp_path, resume=True))
    run(config(tmp_path, "more", data=replace(DATA, train_limit=80), epochs=1, probe_every=0))
    (tmp_path / "more" / "checkpoint.safetensors").replace(
        tmp_path / "run" / "checkpoint.safetensors"
    )
    with pytest.raises(
        CheckpointError, match="trained on other data: there were 80 train images, now there are 72"
    ):
        run(config(tmp_path, resume=True))
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="truncated"):
        run(config(tmp_path, resume=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "dpk"}, "unknown rule 'dpk': did you mean 'dkp'"),
        ({"rule": "no.such:Rule"}, "could not be imported"),
        ({"rule": "torch.nn:Linear"}, "not a subclass of feedbackward.Rule"),
        ({"rule_options": {"centre": True}}, "no option 'centre': did you mean 'center'"),
        ({"model": "vgg66"}, "unknown net 'vgg66'"),
        ({"model": "torch.nn:Flatten"}, "no floating-point parameters"),
        (
            {"model": f"{__name__}:wide"},
            r"returned \[4, 5\] for inputs of shape \[4, .*: expected \[4, 3\]",
        ),
        ({"device": "cuda"}, "no CUDA device"),
        ({"data": replace(DATA, train_limit=1)}, "training image"),
        ({"sites": "published"}, "published sites"),
    ],
)
def test_wrong_names_are_refused(tmp_path, changes, message):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("has CUDA")
    with pytest.raises(fb.FeedbackError, match=message):
        run(config(tmp_path, **changes))


def test_a_rule_of_ones_own_trains(tmp_path):
    assert (
        run(config(tmp_path, rule="feedbackward.rules.direct.dfa:DFA", epochs=1))["status"]
        == "done"
    )
