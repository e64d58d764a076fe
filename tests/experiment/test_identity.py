"""What a run is tied to: it goes on with the very data it had, or says which have changed."""

from __future__ import annotations

import json
import operator
import shutil
import sys
import types
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from test_train import StopAfter
from torch import nn

from feedbackward.cli import main
from feedbackward.errors import CheckpointError, DataError
from feedbackward.experiment.config.files import from_dict, nested
from feedbackward.experiment.config.options import Option, options
from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.data import Data, DataConfig, Images, load_data
from feedbackward.experiment.training import checkpoint
from feedbackward.experiment.training.identity import (
    FREE,
    SPLITS,
    changed_settings,
    check_same_data,
    data_identity,
    described,
)
from feedbackward.experiment.training.inspect import probe_run
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.experiment.training.progress import Progress
from feedbackward.experiment.training.runfolder import RunFolder
from feedbackward.experiment.training.train import train


def made(seed: int, classes: int, counts: list[int]) -> Data:
    draw = np.random.RandomState(seed)
    parts = []
    for count in counts:
        pixels = torch.from_numpy(draw.randint(0, 256, (count, 1, 2, 3), dtype=np.uint8))
        parts.append(Images(pixels, torch.from_numpy(draw.randint(0, classes, count))))
    names = [f"class {i}" for i in range(classes)]
    return Data("made", *parts, names, (float(draw.rand()),), (0.3,))


def changed(data: Data, kind: str, split: str, at: int) -> tuple[Data, str]:
    """The data with one thing changed, and what the message must say."""
    part: Images = getattr(data, split)
    at %= len(part)
    images, labels = part.images.clone(), part.labels.clone()
    if kind == "rename":
        names = [*data.classes]
        names[at % len(names)] = "new"
        return replace(data, classes=names), "here it is 'new'"
    if kind == "reorder":
        return replace(data, classes=[*data.classes[1:], data.classes[0]]), "its class 0 was"
    if kind == "class":
        return replace(data, classes=[*data.classes, "new"]), "with new"
    if kind == "fewer":
        kept = Images(images[1:], labels[1:])
        return replace(data, **{split: kept}), f"there were {len(part)} {split} images"
    if kind == "pixel":
        images[at, 0, 1, 1] ^= 1
    elif kind == "label":
        labels[at] = (labels[at] + 1) % len(data.classes)
    elif kind == "order":
        images, labels = images.roll(1, 0), labels.roll(1, 0)
    return replace(data, **{split: Images(images, labels)}), f"the {split} images, their labels"


@examples(200, 5000)
@given(
    seed=st.integers(0, 9999),
    classes=st.integers(2, 5),
    counts=st.lists(st.integers(2, 9), min_size=3, max_size=3),
    kind=st.sampled_from(["rename", "reorder", "class", "fewer", "pixel", "label", "order"]),
    split=st.sampled_from(SPLITS),
    at=st.integers(0, 99),
)
def test_every_change_is_refused_and_named(seed, classes, counts, kind, split, at) -> None:
    data = made(seed, classes, counts)
    kept = json.loads(json.dumps(data_identity(data)))
    check_same_data(kept, replace(data), "c")
    other, message = changed(data, kind, split, at)
    with pytest.raises(CheckpointError, match=message):
        check_same_data(kept, other, "c")


def test_a_checkpoint_that_does_not_say_its_data_is_refused() -> None:
    data = made(0, 2, [3, 3, 3])
    for old in ({"name": "made", "train": 3, "classes": 2}, None, [], "made"):
        with pytest.raises(CheckpointError, match="does not say which classes and images"):
            check_same_data(old, data, "c")


@pytest.fixture
def pets(tmp_path: Path, cache_folder: Path) -> Path:
    draw = np.random.RandomState(0)
    for split, count in (("train", 16), ("validation", 4), ("test", 4)):
        for shade, name in ((40, "ant"), (200, "bee")):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.randint(shade - 30, shade + 30, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / split / name / f"{i}.png")
    return tmp_path / "pets"


def configured(pets: Path) -> TrainConfig:
    return TrainConfig(
        model="mlp", data=DataConfig(str(pets)), epochs=3, batch_size=8, tensorboard=False, out=str(pets.parent / "run")
    )  # fmt: skip


def run(config: TrainConfig, interrupts: Interrupts | None = None) -> dict:
    with Progress(Console(quiet=True)) as progress:
        return train(config, progress, interrupts or Interrupts())


def rename(pets: Path) -> None:
    for split in SPLITS:
        (pets / split / "ant").rename(pets / split / "wasp")


def relabel(pets: Path) -> None:
    one, other = pets / "test" / "ant" / "0.png", pets / "test" / "bee" / "0.png"
    one.rename(pets / "kept.png")
    other.rename(one)
    (pets / "kept.png").rename(other)


def move_and_rewrite(pets: Path) -> None:
    """The same pictures in other files."""
    for file in sorted(pets.rglob("*.png")):
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "its class 0 was 'ant', here it is 'bee'"),
        (relabel, "the test images, their labels or their order have changed"),
        (move_and_rewrite, None),
    ],
)
def test_a_run_goes_on_with_its_own_data_only(pets, finished, change, message) -> None:
    config = configured(pets)
    if finished:
        run(config)
    else:
        with pytest.raises(InterruptedRunError):
            run(config, StopAfter(6))
    change(pets)
    if message is None:
        assert run(replace(config, resume=True))["status"] == "done"
        return
    with pytest.raises(CheckpointError, match=message):
        run(replace(config, resume=True))
    if finished:
        with pytest.raises(CheckpointError, match=f"{message}.*probe another run"):
            probe_run(pets.parent / "run", None, None)


def test_the_folder_of_a_run_says_how_to_use_its_model(pets) -> None:
    run(replace(configured(pets), epochs=1))
    found = json.loads((pets.parent / "run" / "data.json").read_text(encoding="utf-8"))
    data = load_data(DataConfig(str(pets)))
    assert found["classes"] == ["ant", "bee"]
    assert (found["channels"], found["height"], found["width"]) == (3, 8, 8)
    assert (found["mean"], found["std"]) == (list(data.mean), list(data.std))
    assert found["images"] == {"train": 32, "validation": 8, "test": 8}
    assert f"{data.mean[0]:.4f}" in found["input"]


def test_a_checkpoint_of_other_insides_is_refused(pets) -> None:
    config = configured(pets)
    with pytest.raises(InterruptedRunError):
        run(config, StopAfter(6))
    file = pets.parent / "run" / "checkpoint.safetensors"
    whole = checkpoint.load(file)
    shutil.copy(file, pets / "kept")
    # fp32 has no loss scale and this rule no delay, so that nothing reads "scaler" and "stale"
    for key in ("config", "network", "data", "position", "model", "feedback", "weights", "random"):
        for other in ({}, [1]):
            checkpoint.save(file, whole | {key: other})
            with pytest.raises(CheckpointError):
                run(replace(config, resume=True))
    shutil.copy(pets / "kept", file)
    assert run(replace(config, resume=True))["status"] == "done"


def stopped(config: TrainConfig) -> TrainConfig:
    """The run, stopped in its second epoch; returns what goes on with it."""
    with pytest.raises(InterruptedRunError):
        run(config, StopAfter(6))
    return replace(config, resume=True)


def another(option: Option) -> Any:
    """A value of the type that an option has, other than the usual one."""
    usual = operator.attrgetter(option.field)(TrainConfig().resolved())
    kinds = [*typing.get_args(option.hint), option.hint]
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            return next(v for v in typing.get_args(kind) if v != usual)
    if option.is_switch:
        return not usual
    if option.is_mapping:
        return {"center": True}
    named = {"recipe": "published", "sites": "blocks"}
    numbers = {int: (usual or 0) + 2, float: (usual or 0) + 0.25} if {int, float} & {*kinds} else {}
    return next((numbers[k] for k in kinds if k in numbers), named.get(option.field, "other"))


TIED = [option for option in options(TrainConfig) if option.field not in ("resume", "overwrite")]


@pytest.mark.parametrize("option", TIED, ids=lambda option: option.field)
def test_every_setting_that_decides_a_result_is_tied(option: Option) -> None:
    """All but those that say where and how fast: a new setting is tied until it is said to be free."""
    usual = TrainConfig()
    other = from_dict(TrainConfig, nested(option.field, another(option)))
    named = {change.partition(":")[0] for change in changed_settings(usual, other)}
    assert changed_settings(usual, replace(usual)) == []
    assert (option.field in named) == (option.field not in FREE)


@pytest.mark.parametrize("change", ["seed: 0 -> 7", "batch_size: 8 -> 16", "epochs: 3 -> 5"])
def test_settings_that_were_edited_by_hand_are_refused(pets: Path, change: str) -> None:
    again, file = stopped(configured(pets)), pets.parent / "run" / "config.yaml"
    whole, (key, old, new) = file.read_text(), change.replace(" ->", ":").split(": ")
    file.write_text(whole.replace(f"{key}: {old}", f"{key}: {new}"))
    edited = replace(RunFolder.existing(file.parent).config(), resume=True)
    with pytest.raises(CheckpointError, match=rf"saved under other settings \({change}"):
        run(edited)
    file.write_text(whole)
    assert run(again)["status"] == "done"


@pytest.mark.parametrize("change", ["seed: 0 -> 7", "batch_size: 8 -> 16", "epochs: 3 -> 5"])
def test_a_finished_run_is_not_taken_for_one_of_other_settings(pets: Path, change: str) -> None:
    result = run(configured(pets))
    folder = RunFolder.existing(pets.parent / "run")
    again = replace(folder.config(), resume=True)
    whole, (key, old, new) = folder.config_file.read_text(), change.replace(" ->", ":").split(": ")
    folder.config_file.write_text(whole.replace(f"{key}: {old}", f"{key}: {new}"))
    with pytest.raises(
        CheckpointError, match=rf"result.json was saved under other settings \({change}"
    ):
        run(replace(folder.config(), resume=True))
    folder.config_file.write_text(whole)
    assert run(again) == result == folder.result()


def test_another_network_of_the_same_shapes_is_refused(pets: Path, monkeypatch: Any) -> None:
    module = types.ModuleType("tied_net")
    module.kind = nn.Tanh
    module.net = lambda in_shape, classes: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 5), module.kind(), nn.Linear(5, classes)
    )
    monkeypatch.setitem(sys.modules, "tied_net", module)
    again = stopped(replace(configured(pets), model="tied_net:net", rule="dfa"))
    module.kind = nn.ReLU
    with pytest.raises(CheckpointError, match=r"it had '2: Tanh\(\)' where now there is '2: ReLU"):
        run(again)
    module.kind = nn.Tanh
    assert run(again)["status"] == "done"


def test_a_network_is_described_without_its_own_words() -> None:
    """What a user's module prints may be another text in another process."""

    class Own(nn.Linear):
        def extra_repr(self) -> str:
            return f"{id(self)}"

    lines = described(nn.Sequential(Own(1, 2), nn.Dropout(0.3)))
    assert [line.rpartition(".")[2] for line in lines[:2]] == ["the network: Sequential()", "Own()"]
    assert lines[2] == "1: Dropout(p=0.3, inplace=False)"


@pytest.mark.parametrize("finished", [False, True])
def test_data_may_be_moved(pets: Path, finished: bool, capsys: Any) -> None:
    config, place = configured(pets), pets.parent / "run"
    run(replace(config, out=str(pets.parent / "whole")))
    if finished:
        run(config)
    again = replace(config, resume=True) if finished else stopped(config)
    animals = pets.rename(pets.with_name("animals"))
    with pytest.raises(DataError, match="no image folder"):
        probe_run(place, None, None)
    probe_run(place, None, None, data=str(animals))
    assert run(replace(again, data=replace(config.data, name=str(animals))))["status"] == "done"
    ends = [(pets.parent / name / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert ends[0] == ends[1]
    # from here on the folder knows
    probe_run(place, None, None)
    assert RunFolder.existing(place).config().data.name == str(animals)


def test_what_failed_before_its_first_checkpoint_begins_anew(pets: Path) -> None:
    config = configured(pets)
    RunFolder.claim(config.resolved()).close()
    run(replace(config, seed=3))
    assert RunFolder.existing(pets.parent / "run").config().seed == 3


def test_lost_rows_of_metrics_are_told(pets: Path) -> None:
    again = stopped(configured(pets))
    (pets.parent / "run" / "metrics.jsonl").unlink()
    with pytest.warns(RuntimeWarning, match=r"metrics\.jsonl has lost 1 of the 1 rows"):
        run(again)


def compared(pets: Path, seeds: str) -> int:
    return main(
        ["compare", "--model=mlp", f"--data.name={pets}", "--rules=[bp]", f"--seeds={seeds}", "--epochs=1", "--workers=1",
         "--batch_size=8", "--tensorboard=false", "--timing_steps=0", f"--out={pets.parent / 'both'}"]
    )  # fmt: skip


def test_a_comparison_does_not_mix_data(pets, capsys) -> None:
    """A seed more is trained beside the finished ones if the images are still those."""
    assert compared(pets, "[0]") == 0
    assert compared(pets, "[0,1]") == 0
    relabel(pets)
    assert compared(pets, "[0,1,2]") == 1
    assert "bp-s0 was trained on other data" in capsys.readouterr().out
    relabel(pets)
    assert compared(pets, "[0,1,2]") == 0
