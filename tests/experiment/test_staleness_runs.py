"""Experiments with late gradients: what is waiting is part of a checkpoint, and what is configured is what runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import StopAfter, assert_same_run, config, run

from feedbackward.errors import ConfigError
from feedbackward.experiment.data.dataset import load_data
from feedbackward.experiment.training.interrupts import InterruptedRunError
from feedbackward.experiment.training.run import Run


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "dkp", "staleness": 2},
        {"rule": "dsp"},
        {"rule": "dkp", "staleness": 1, "predict_weights": True},
    ],
    ids=["dkp", "dsp", "predicted"],
)
def test_an_interrupted_run_goes_on_with_what_was_waiting(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    run(config(tmp_path, "whole", **changes))
    with pytest.raises(InterruptedRunError):
        run(config(tmp_path, "broken", **changes), StopAfter(4))
    run(config(tmp_path, "broken", resume=True, **changes))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_the_configured_staleness_is_on_top_of_the_rules(tmp_path: Path) -> None:
    def delays(**changes: object) -> tuple[int, ...] | None:
        settings = config(tmp_path, **changes).resolved()
        stale = Run(settings, load_data(settings.data), torch.device("cpu")).stale
        return stale and stale.delays

    assert delays(rule="bp") is None
    assert delays(rule="bp", staleness=1) == (1, 1, 1)
    assert delays(rule="bp", backward_steps=1) == (1, 0, 0)
    assert delays(rule="bp", backward_steps=1, staleness=1) == (2, 1, 1)
    assert delays(rule="dsp") == (4, 2, 0)
    assert delays(rule="dsp", staleness=1, rule_options={"blocks": 2}) == (3, 3, 1)


def test_a_run_is_trained_with_gradients_of_earlier_steps(tmp_path: Path) -> None:
    """Two steps at staleness 2 train nothing; without staleness they do."""
    settings = config(tmp_path, rule="dfa", staleness=2).resolved()
    data = load_data(settings.data)
    for stale in (2, 0):
        made = Run(replace(settings, staleness=stale), data, torch.device("cpu"))
        before = {name: p.detach().clone() for name, p in made.learner.named_parameters()}
        for images, labels in list(made.loader.epoch(0))[:2]:
            made.step(images, labels)
        still = [torch.equal(p, before[name]) for name, p in made.learner.named_parameters()]
        assert all(still) if stale else not any(still)


def test_a_run_predicts_its_weights_where_it_is_told_to(tmp_path: Path) -> None:
    """The third step is the first at other weights: at staleness 1 the first moves nothing, so the second has no movement to go on."""
    losses = {}
    for predict in (False, True):
        settings = config(tmp_path, rule="bp", staleness=1, predict_weights=predict).resolved()
        made = Run(settings, load_data(settings.data), torch.device("cpu"))
        batches = list(made.loader.epoch(0))[:3]
        losses[predict] = [made.step(*batch) for batch in batches]
    assert losses[True][:2] == losses[False][:2]
    assert losses[True][2] != losses[False][2]


def test_what_experiments_refuse(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="staleness is -1"):
        config(tmp_path, staleness=-1).resolved()
    settings = config(tmp_path, rule="dsp", precision="fp16").resolved()
    with pytest.raises(ConfigError, match="fp16"):
        Run(settings, load_data(settings.data), torch.device("cpu"))
