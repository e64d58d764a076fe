"""Grids of comparisons: their points, what is skipped and resumed, what is shown of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from feedbackward.cli import main
from feedbackward.errors import ConfigError
from feedbackward.experiment.config.options import SHIPPED
from feedbackward.experiment.grid.candidates import run_config
from feedbackward.experiment.grid.definition import load_grid, make_grid
from feedbackward.experiment.grid.plan import Options, expand, in_words

TINY: dict[str, Any] = {
    "title": "Tiny",
    "model": "mlp",
    "data": {"train_limit": 100, "validation": 40, "test_limit": 40, "size": 10},
    "rules": ["bp", {"rule": "frozen", "label": "Frozen", "backward_steps": 1}],
    "seeds": [0, 1],
    "epochs": 2,
    "batch_size": 50,
    "probe_every": 0,
    "timing_steps": 0,
    "sections": [{"name": "main", "axes": {"data.name": ["fashion-mini", "cifar100"]}}],
    "scaled": {"seeds": [0], "epochs": 1},
}

GRIDS = [f.stem for f in sorted(SHIPPED.glob("*.yaml")) if "\nsections:" in f.read_text()]


@pytest.fixture
def study(home: Path) -> Path:
    (home / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (home / "data").mkdir()
    return home


def run(*more: str) -> int:
    flags = ["--data-root", "data", "--out", "out", "--workers", "1"]
    return main(["compare", "--config", "tiny.yaml", *flags, *more])


def changed(**values: Any) -> Any:
    return make_grid("tiny", {**TINY, **values}, "the grid")


def test_every_point_of_the_grid_is_a_comparison() -> None:
    sections = [{"name": "main", "axes": {"model": ["mlp", "small_cnn"], "norm": [True, False]}}]
    plan = expand(changed(sections=sections), Options("out"))
    found = {(c.config.model, c.config.norm) for c in plan.comparisons.values()}
    assert found == {(model, norm) for model in ("mlp", "small_cnn") for norm in (True, False)}
    assert all(c.config.epochs == 2 and c.config.seeds == [0, 1] for c in plan.comparisons.values())


def test_columns_tell_settings_of_w_from_those_of_b() -> None:
    assert in_words("forward.weight_decay", 0.1) == "weight_decay 0.1"
    assert in_words("feedback.weight_decay", 0.1) == "feedback weight_decay 0.1"
    assert in_words("norm", False) == "norm false"
    assert in_words("data.name", "/data/cifar10") == "cifar10"


def test_overrides_and_small_runs_change_the_points_that_they_fit() -> None:
    sections = [{"name": "main", "axes": {"model": ["mlp", "small_cnn"]}}]
    scaled = {"seeds": [0], "overrides": [{"when": {"model": "small_cnn"}, "epochs": 7}]}
    study = changed(
        sections=sections, scaled=scaled, overrides=[{"when": {"model": "mlp"}, "epochs": 5}]
    )
    for scale, epochs, seeds in (
        (1.0, {"mlp": 5, "small_cnn": 2}, [0, 1]),
        (0.5, {"mlp": 5, "small_cnn": 7}, [0]),
    ):
        configs = [c.config for c in expand(study, Options("out", scale)).comparisons.values()]
        assert {c.model: c.epochs for c in configs} == epochs
        assert all(c.seeds == seeds for c in configs)


@pytest.mark.parametrize("name", GRIDS)
def test_every_shipped_study_makes_its_cells(name: str) -> None:
    """In full and small, every rule of every comparison has a config that training accepts."""
    for scale in (1.0, 0.05):
        for comparison in expand(
            load_grid(SHIPPED / f"{name}.yaml"), Options("out", scale)
        ).comparisons.values():
            for candidate in comparison.candidates:
                run_config(comparison.config, candidate, 0)


def test_the_papers_study_is_the_grid_that_it_says() -> None:
    plan = expand(load_grid(SHIPPED / "paper.yaml"), Options("out"))
    table = [b for b in plan.blocks if b.section == "table"]
    assert len(table) == 3 * 4
    assert all(len(b.labels) == 6 and b.seeds == (0, 1, 2) for b in table)
    assert {plan.of(b).config.model: plan.of(b).config.epochs for b in table} == {
        "small_cnn": 50,
        "alexnet": 90,
        "vgg16": 30,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sections": []}, "at least one grid"),
        ({"sections": [{"name": "a", "axes": {"nets": ["mlp"]}}]}, "nets"),
        ({"sections": [{"name": "a", "axes": {"model": []}}]}, "needs a list"),
        ({"epoch": 3}, "unknown key 'epoch'"),
        ({"sections": [{"name": "a"}, {"name": "a"}]}, "two sections"),
    ],
)
def test_a_wrong_study_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(**values)


def test_a_study_runs_shows_what_has_no_data_and_skips_what_is_done(
    study: Path, capsys: Any
) -> None:
    assert run() == 0
    shown = capsys.readouterr().out
    assert "no data" in shown
    assert "hf download" in shown  # how to get it
    results = json.loads((study / "out" / "results.json").read_text())
    rules = results["sections"][0]["tables"][0]["blocks"][0]["rules"]
    assert [(rule["rule"], rule["backward_steps"]) for rule in rules] == [("bp", 0), ("frozen", 1)]
    table = (study / "out" / "report.md").read_text()
    assert "CIFAR-100 (no data)" in table
    assert "100 images" in table
    assert "2 epochs" in table
    assert "2 seeds" in table
    assert "<html" in (study / "out" / "report.html").read_text()
    weights = sorted((study / "out").rglob("model.safetensors"))
    assert len(weights) == 2 * 2
    times = [file.stat().st_mtime_ns for file in weights]
    weights[0].parent.joinpath("result.json").unlink(missing_ok=True)
    assert run() == 0  # the others are not run again
    assert [file.stat().st_mtime_ns for file in weights[1:]] == times[1:]


def test_one_part_of_a_study_and_the_rest_later(study: Path) -> None:
    assert run("--only.seeds", "1", "--only.rules", "bp") == 0
    assert len([*(study / "out").rglob("model.safetensors")]) == 1
    assert "not run" in (study / "out" / "report.md").read_text()
    assert run() == 0
    assert len([*(study / "out").rglob("model.safetensors")]) == 4
    assert run("--only.rules", "bq") == 2


@pytest.mark.nightly
def test_two_processes_give_what_one_gives(study: Path) -> None:
    def accuracies(folder: str) -> dict[str, Any]:
        files = sorted((study / folder).rglob("metrics.jsonl"))
        keys = ("train_loss", "validation_accuracy")
        rows = {
            str(f.relative_to(study / folder)): map(json.loads, f.read_text().splitlines())
            for f in files
        }
        return {
            name: [[row.get(key) for key in keys] for row in made] for name, made in rows.items()
        }

    assert run() == 0
    assert run("--out", "two", "--workers", "2") == 0
    assert accuracies("out") == accuracies("two")
    assert len(accuracies("two")) == 4


def test_a_folder_of_something_else_is_left_alone(study: Path, capsys: Any) -> None:
    (study / "out").mkdir()
    (study / "out" / "thesis.txt").write_text("mine")
    assert run() != 0
    assert "not the folder of a comparison" in capsys.readouterr().err
    assert main(["compare", "--config", "papper"]) != 0
    assert "did you mean paper" in capsys.readouterr().err
