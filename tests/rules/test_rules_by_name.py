"""Rules from outside the package, rules that are added to it, and mixtures: in `attach` and on the command line."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import test_pairwise
import test_rules_everywhere as everywhere
import torch
from test_cli import COMMAND, ENVIRONMENT, TINY, cli, refused
from torch.nn import functional as F

import feedbackward as fb
from feedbackward.errors import ConfigError
from feedbackward.experiment.config.schema import CompareConfig
from feedbackward.experiment.training.building import make_rule

TOY = '''
from dataclasses import dataclass

import feedbackward as fb


@dataclass(frozen=True)
class Toy(fb.Rule):
    """DFA that learns its feedback from the sign of the error."""

    strength: float = 1.0

    name = "toy"
    label = "Toy"
    paper = "nobody 2099"
    unlocked = "backward"
    learned = True

    def graph(self, sites, source):
        return fb.star(sites, source, fb.Dense())

    def feedback_grad(self, edge, weights, d, h):
        return edge.operator.correlate(weights, self.strength * d.sign() / len(d), h, center=False)
'''
ONE_EPOCH = [*TINY, "--epochs", "1"]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with a rule in a folder that is the working directory."""
    (tmp_path / "toy_module.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_module", raising=False)
    return importlib.import_module("toy_module")


def test_a_rule_from_outside_in_attach(toy: ModuleType) -> None:
    model, x, y = everywhere.plain(), torch.randn(9, 6), torch.arange(9) % 3
    learner = fb.attach(model, toy.Toy(strength=2.0), example=x)
    with torch.no_grad():
        e = (F.softmax(model(x), 1) - F.one_hot(y, 3)) / 9
        h = model[:2](x)
    F.cross_entropy(learner(x), y).backward()
    B = learner.feedback_of(learner.graph.edges[0])
    torch.testing.assert_close(B.grad, 2.0 * e.sign().t() @ h / 9)
    slope = 1 - h.square()
    torch.testing.assert_close(model[0].bias.grad, (e @ B.detach() * slope).sum(0))


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_a_rule_from_outside_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As `python -m feedbackward`, which looks for modules where it is called."""
    flags = [
        "train",
        "--rule",
        "toy_module:Toy",
        "--rule-options.strength",
        "0.5",
        *ONE_EPOCH,
        "--out",
        "run",
    ]
    done = subprocess.run(
        [*COMMAND, *flags], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "done"
    assert cli(capsys, "probe", "run", "--images", "20")[0] == 0
    rules = ["--rules", "bp,toy_module:Toy", "--seeds", "0", "--timing-steps", "0", "--out", "both"]
    code, _, err = cli(capsys, "compare", *ONE_EPOCH, *rules)
    assert (code, err) == (0, "")
    results = json.loads((tmp_path / "both" / "results.json").read_text())
    assert [(rule["label"], rule["runs"][0]["status"]) for rule in results["rules"]] == [
        ("BP", "done"),
        ("Toy", "done"),
    ]
    assert (
        results["rules"][1]["rates"]["feedback_lr"] is not None
    )  # it learns feedback, which has a rate
    assert "has no option 'strengh'" in refused(
        capsys, *flags[:3], "--rule-options.strengh", "1", *ONE_EPOCH
    )


def test_a_rule_that_is_added_is_found_everywhere(
    toy: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file and its line in RULES are enough for the tables, the command line and the laws."""
    monkeypatch.setitem(fb.RULES, "toy", toy.Toy)
    assert "nobody 2099" in cli(capsys, "rules", "--format", "markdown")[1]
    assert CompareConfig(rules=["all"]).entries()[-1].rule == "toy"
    assert cli(capsys, "train", "--rule", "toy", *ONE_EPOCH, "--out", "named")[0] == 0
    for case in everywhere.CASES:
        everywhere.test_laws(case, "toy")
    test_pairwise.test_every_rule_takes_one_of_the_nets("toy")
    for name in list(fb.RULES)[:-1]:
        test_pairwise.test_it_differs_from_every_other(name)


def test_a_copy_of_a_rule_is_noticed(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fb.RULES, "copied", fb.DFA)
    with pytest.raises(AssertionError, match="dfa and copied"):
        test_pairwise.test_it_differs_from_every_other("dfa")
    monkeypatch.setattr(
        toy.Toy, "feedback_grad", lambda self, edge, weights, d, h: (weights[0] * float("nan"),)
    )
    monkeypatch.setitem(fb.RULES, "broken", toy.Toy)
    with pytest.raises(AssertionError):
        everywhere.test_laws(everywhere.CASES[0], "broken")


MIXTURE = (
    '{"block1*": {"rule": dfa, "options": {"operator": {"name": sparse, "nonzeros": 2}}}, "*": dkp}'
)


@pytest.mark.nightly
def test_a_mixture_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = cli(
        capsys,
        "train",
        "--rule",
        "mixed",
        "--rule-options.rules",
        MIXTURE,
        *ONE_EPOCH,
        "--out",
        tmp_path / "run",
    )
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "done"
    assert cli(capsys, "probe", tmp_path / "run", "--images", "20")[0] == 0
    (tmp_path / "c.yaml").write_text(
        f"rules: [bp, {{rule: mixed, label: both, feedback_lr: 0.01, options: {{rules: {MIXTURE}}}}}]\nseeds: [0]\ntiming_steps: 0\n"
    )
    code, _, err = cli(
        capsys, "compare", "--config", tmp_path / "c.yaml", *ONE_EPOCH, "--out", tmp_path / "c"
    )
    assert (code, err) == (0, "")
    both = json.loads((tmp_path / "c" / "results.json").read_text())["rules"][1]
    assert (both["label"], both["rates"]["feedback_lr"]) == ("both", 0.01)
    bad = '{"nowhere": dfa, "*": dkp}'
    assert "no site is left for 'nowhere'" in refused(
        capsys, "train", "--rule", "mixed", "--rule-options.rules", bad, *ONE_EPOCH
    )
    assert "needs its option 'rules'" in refused(capsys, "train", "--rule", "mixed", *ONE_EPOCH)


@pytest.mark.nightly
@pytest.mark.slow
def test_all_rules_in_one_comparison(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One command for the whole table: every rule is run, or refused with its reason."""
    flags = [
        "--model",
        "test_train:Net",
        "--data.size",
        "8",
        "--data.classes",
        "3",
        "--timing-steps",
        "0",
        "--seeds",
        "0",
    ]
    out = ["--probe-every", "0", "--out", tmp_path]
    code, text, err = cli(capsys, "compare", "--rules", "all", *ONE_EPOCH[2:], *flags, *out)
    assert code == 0, err
    rules = json.loads((tmp_path / "results.json").read_text())["rules"]
    assert {rule["rule"] for rule in rules} == set(fb.RULES)
    # a net with batch norm and dropout
    assert [rule["rule"] for rule in rules if rule.get("refused")] == ["lra"]
    for rule in rules:
        assert rule.get("refused") or rule["runs"][0]["status"] == "done", rule["label"]
        assert rule["label"] in text
    page = (tmp_path / "report.html").read_text()
    assert "LRA-E was refused: " in page


def test_mixtures_by_name() -> None:
    spec = {"features.*": "bp", "classifier.*": {"rule": "dkp", "options": {"center": True}}}
    assert make_rule("mixed", {"rules": spec}) == fb.Mixed(
        {"features.*": fb.BP(), "classifier.*": fb.DKP(center=True)}
    )
    for options, sentence in (
        ({}, "needs its option 'rules'"),
        ({"rules": ["bp"]}, "written as {pattern: rule"),
        ({"rules": {"a": {"options": {}}}}, "the rule for 'a' is"),
        ({"rules": {"a": {"rule": "dfa", "center": True}}}, "the rule for 'a' is"),
        ({"rules": {"a": "dfaa"}}, "unknown rule 'dfaa'"),
        ({"rules": {"a": {"rule": "dfa", "options": {"center": True}}}}, "has no option 'center'"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            make_rule("mixed", options)
