"""What a training loop may do besides the rule: steps by backprop now and then, feedback that stops learning."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from test_train import CPU, DATA, StopAfter, assert_same_run, config, run
from torch import nn

import feedbackward as fb
from feedbackward.errors import ConfigError
from feedbackward.experiment.config.schema import Changes, CompareConfig, RuleEntry, TrainConfig
from feedbackward.experiment.data.dataset import load_data
from feedbackward.experiment.grid.compare import compare
from feedbackward.experiment.report.summary import control, notes
from feedbackward.experiment.training.building import make_rule
from feedbackward.experiment.training.interrupts import InterruptedRunError, Interrupts
from feedbackward.experiment.training.run import Run


def made(**changes: object) -> Run:
    rates = {"forward": Changes(lr=0.05), "feedback": Changes(lr=0.05)}
    base = TrainConfig(model="test_train:Net", data=DATA, epochs=3, batch_size=16, seed=3, **rates)  # type: ignore[arg-type]
    return Run(replace(base, **changes).resolved(), load_data(DATA), CPU)


def go(run: Run, epochs: int = 1) -> list[dict[str, torch.Tensor]]:
    """Train, and give the weights after each step."""
    states = []
    for _ in range(epochs):
        for images, labels in run.loader.epoch(run.position.epoch):
            run.step(images, labels)
            states.append({k: v.clone() for k, v in run.learner.state_dict().items()})
        run.position.next_epoch()
    return states


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], part: str = "") -> bool:
    """Without the statistics of norms, which go on in an auxiliary network too."""
    keys = [
        key
        for key in a
        if key.startswith(part) and "running" not in key and "num_batches" not in key
    ]
    return all(torch.equal(a[key], b[key]) for key in keys)


@pytest.mark.parametrize("rule", ["frozen", "dfa", "dkp", "drtp", "dgl", "kp"])
def test_a_step_by_backprop_is_backprop(rule: str) -> None:
    """Every step calibrated: the network's weights are those of backprop, bit by bit, whatever the rule."""
    truth = go(made(rule="bp"))[-1]
    found = go(made(rule=rule, calibrate_every=1))[-1]
    assert all(torch.equal(found[key], value) for key, value in truth.items())


def test_calibration_alone_trains_hidden_layers_in_its_steps_only() -> None:
    run = made(rule="frozen", calibrate_every=3, forward=Changes(lr=0.05, momentum=0.0, nesterov=False, weight_decay=0.0))  # fmt: skip
    before = {k: v.clone() for k, v in run.learner.state_dict().items()}
    states = go(run, epochs=2)
    hidden = "model.0.weight"
    moved = [
        not torch.equal(a[hidden], b[hidden])
        for a, b in zip([before, *states], states, strict=False)
    ]
    assert moved == [(i + 1) % 3 == 0 for i in range(len(states))]
    assert run.calibrations == len(states) // 3


@pytest.mark.parametrize(
    ("rule", "learns"), [("dkp", False), ("kp", False), ("fdfa", True), ("grape", True)]
)
def test_feedback_in_a_step_by_backprop(rule: str, learns: bool) -> None:
    """Only what learns in a phase of its own goes on learning."""
    run = made(rule=rule, calibrate_every=1)
    before = {k: v.clone() for k, v in run.learner.state_dict().items()}
    assert equal(before, go(run)[0], "feedback") is not learns


def test_a_phase_comes_every_so_many_steps() -> None:
    """Feedback moves then and only then; the network moves in between."""
    run = made(rule="fdfa", feedback_every=3)
    before = {k: v.clone() for k, v in run.learner.state_dict().items()}
    states = go(run, epochs=2)
    moved = [not equal(a, b, "feedback") for a, b in zip([before, *states], states, strict=False)]
    assert moved == [(i + 1) % 3 == 0 for i in range(len(states))]
    assert not any(equal(a, b, "model") for a, b in zip([before, *states], states, strict=False))


@pytest.mark.parametrize("schedule", ["replay", "joint"])
def test_calibration_goes_with_every_schedule(schedule: str) -> None:
    states = go(made(rule="dkp", calibrate_every=2, schedule=schedule))
    other = go(made(rule="dkp", calibrate_every=2))
    for a, b in zip(states, other, strict=True):
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["dkp", "kp", "fdfa", "dgl"])
@pytest.mark.parametrize("after", [0, 1])
def test_frozen_feedback_stays_and_the_network_trains_on(rule: str, after: int) -> None:
    """Weight decay and momentum included; before, nothing is different."""
    # what begins at zero would stay there
    options = {"operator": "dense"} if rule in ("dkp", "fdfa") else {}
    run = made(rule=rule, rule_options=options, freeze_feedback_after=after)
    states, length = go(run, epochs=2), len(run.loader)
    others = go(made(rule=rule, rule_options=options), epochs=2)
    frozen = states[length - 1] if after else None
    for step, (state, other) in enumerate(zip(states, others, strict=True)):
        if step < after * length:
            assert equal(state, other)
            continue
        frozen = frozen or state
        assert equal(frozen, state, "feedback")
        assert not equal(states[step - 1], state, "model") or step == 0
    assert not equal(states[-1], others[-1], "feedback")


def test_feedback_that_never_learns_is_dfa() -> None:
    """DKP frozen from the start starts from the same seed as DFA."""
    random = {"orthogonal": False, "operator": {"name": "dense"}}
    frozen, dfa = (
        go(made(rule="dkp", rule_options=random, freeze_feedback_after=0)),
        go(made(rule="dfa")),
    )
    assert equal(dfa[-1], frozen[-1])


def test_feedback_that_stays_zero_is_refused() -> None:
    with pytest.raises(fb.FeedbackError, match=r"are zero and do not require gradients.*fb\.Dense"):
        go(made(rule="dkp", freeze_feedback_after=0))


def test_frozen_feedback_gets_no_late_gradients() -> None:
    run = made(rule="dkp", freeze_feedback_after=1, staleness=2)
    states = go(run, epochs=2)
    assert equal(states[len(run.loader) - 1], states[-1], "feedback")


@pytest.mark.parametrize("changes", [{"calibrate_every": 2}, {"freeze_feedback_after": 1}], ids=str)
@pytest.mark.parametrize("rule", ["dkp", "grape"])
def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path, rule, changes) -> None:  # type: ignore[no-untyped-def]
    run(config(tmp_path, "whole", rule=rule, **changes))
    broken = config(tmp_path, "broken", rule=rule, **changes)
    for _ in range(30):
        try:
            run(broken, StopAfter(5))
            break
        except InterruptedRunError:
            broken = replace(broken, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_what_was_done_is_recorded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = run(config(tmp_path, calibrate_every=4))
    steps = 3 * len(made().loader)
    assert result["calibrations"] == steps // 4
    assert json.loads((tmp_path / "run" / "result.json").read_text())["calibrations"] == steps // 4
    assert "calibrate_every: 4" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_comparison_has_conditions_per_rule_and_tells_of_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rules: list[str | RuleEntry] = [
        "bp",
        RuleEntry(rule="frozen", calibrate_every=3),
        "frozen",
        RuleEntry(rule="dkp", freeze_feedback_after=1),
    ]
    settings = CompareConfig(
        model="test_train:Net", data=DATA, epochs=1, batch_size=16, probe_every=0, tensorboard=False, rules=rules,
        seeds=[0], timing_steps=0, out=str(tmp_path / "compare"),
    )  # fmt: skip
    results = compare(settings, Console(quiet=True), Interrupts())
    labels = ["BP", "Frozen (calibrate_every=3)", "Frozen", "DKP (freeze_feedback_after=1)"]
    assert [rule["label"] for rule in results["rules"]] == labels
    assert [rule["calibrate_every"] for rule in results["rules"]] == [0, 3, 0, 0]
    assert results["rules"][3]["freeze_feedback_after"] == 1
    assert control(results, "frozen") is results["rules"][2]
    told = [note for note in notes(results) if "exact backprop" in note]
    assert told == [
        "Frozen (calibrate_every=3): one step in 3 is by exact backprop, which transports the forward weights."
    ]


@pytest.mark.parametrize("name", ["backward_steps", "calibrate_every", "freeze_feedback_after"])
def test_negative_counts_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is -1: it must be at least 0"):
        TrainConfig(**{name: -1}).resolved()  # type: ignore[arg-type]


def test_a_loss_scale_with_and_without_feedback_gradients() -> None:
    """Under fp16 an optimizer that got no gradient must not ask the loss scale."""
    scaled = made(rule="dkp", calibrate_every=2, freeze_feedback_after=1)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert len(go(scaled, epochs=2)) == 2 * len(scaled.loader)


def test_flipped_from_a_config() -> None:
    assert make_rule("flipped", {}) == fb.rules.Flipped(fb.DKP())
    spec = {"rule": "dkp", "options": {"center": False}}
    assert make_rule("flipped", {"rule": spec}) == fb.rules.Flipped(fb.DKP(center=False))
    with pytest.raises(ConfigError, match=r"the rule to flip is 3: give a rule's name"):
        make_rule("flipped", {"rule": 3})


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_dropout_that_is_no_probability_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=f"dropout is {value}: it is a probability"):
        TrainConfig(dropout=value).resolved()


def test_the_configured_dropout_reaches_the_net() -> None:
    trainee = made(rule="dkp", model="mlp", dropout=0.3)
    assert {m.p for m in trainee.learner.model.modules() if isinstance(m, nn.Dropout)} == {0.3}
