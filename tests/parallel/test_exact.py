"""On 2 and 3 processes, weights, feedback and batch statistics are those of one process that takes
the micro-batches in turn; or a rule is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS, RULES, Case
from ranks import chosen, needs_gloo, run_ranks

import feedbackward as fb

pytestmark = needs_gloo
STEPS = 20

CASES = {
    **{f"mlp {name}": Case("mlp", rule) for name, rule in RULES.items()},
    **{
        f"convolutions {name}": Case("convolutions", RULES[name], rows=(8, 7))
        for name in ("bp", "dkp", "kp", "dgl")
    },
    **{
        f"residual {name}": Case("residual", RULES[name], sites="blocks")
        for name in ("dkp", "drtp", "dfa")
    },
    "residual bp": Case("residual", fb.BP()),
    **{
        f"every rule: {name}": Case("plain", rule(), rows=(10,), micro_batches=2)
        for name, rule in fb.RULES.items()
    },
}


def all_cases(rank: int, names: list[str]) -> dict[str, Any]:
    """The whole state, from rank 0, and the losses, of these cases."""
    found: dict[str, Any] = {}
    for name in names:
        case = CASES[name]
        steps = 3 if name.startswith("every") else STEPS
        try:
            pipe, losses = case.piped(steps, timeout=40)
            found[name] = {"state": pipe.gather_state(), "losses": losses}
        except fb.FeedbackError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, Any]]]:
    folder: Path = tmp_path_factory.mktemp("exact")
    names = chosen(request, "name")
    made = {ranks: run_ranks(all_cases, ranks, folder / str(ranks), names) for ranks in (2, 3)}
    for results in made.values():
        for result in results:
            assert isinstance(result, dict), result
    return made


def expected(case: Case, steps: int) -> dict[str, torch.Tensor]:
    if case.net == "residual":  # with dropout, whose masks are those of any division
        pipe, _ = case.piped(steps)
        state = pipe.gather_state()
        assert state is not None
        return state
    return case.naive(steps)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(found: dict[int, list[dict[str, Any]]], name: str) -> None:
    steps = 3 if name.startswith("every") else STEPS
    results = {ranks: [result[name] for result in found[ranks]] for ranks in found}
    refused = [text for texts in results.values() for text in texts if isinstance(text, str)]
    if refused:
        rule = CASES[name].rule
        assert name.startswith("every"), refused[0]
        assert rule.label in refused[0]
        if "cannot be divided" not in refused[0]:  # nor on one process
            with pytest.raises(fb.FeedbackError, match=re.escape(refused[0])):
                CASES[name].learner()
        assert all(isinstance(text, str) for texts in results.values() for text in texts)
        return
    state = expected(CASES[name], steps)
    for ranks, per_rank in results.items():
        whole = per_rank[0]["state"]
        assert whole.keys() == state.keys()
        for key, value in state.items():
            worst = (whole[key] - value).abs().max().item()
            assert torch.allclose(whole[key], value, rtol=1e-12, atol=1e-14), (ranks, key, worst)
        assert all(result["losses"] == per_rank[0]["losses"] for result in per_rank)


@pytest.mark.nightly
def test_what_was_refused(found: dict[int, list[dict[str, Any]]]) -> None:
    refused = {
        name.removeprefix("every rule: ")
        for name, result in found[2][0].items()
        if isinstance(result, str)
    }
    assert not refused & {"bp", "dfa", "dkp", "drtp", "dgl", "fa", "kp", "frozen", "sign_symmetry"}
    in_phase = {name for name, rule in fb.RULES.items() if rule().in_phase}
    assert refused >= in_phase


def test_phases_are_refused_on_one_process_too() -> None:
    """Nobody would call the phase, so that the feedback would not learn."""
    for name in ("weight_mirror", "fdfa", "relayed_kp"):
        case = Case("plain", fb.RULES[name](), rows=(10,))
        with pytest.raises(fb.AttachError, match="phase of its own, which a pipeline does not run"):
            fb.parallel.pipeline(case.learner(), case.batch(0)[0])


def test_one_process_equals_the_learner() -> None:
    """Without dropout, a pipeline of one process is the naive loop."""
    for name in ("dkp", "bp", "kp"):
        case = Case("mlp", RULES[name])
        pipe, _ = case.piped(5)
        for key, value in case.naive(5).items():
            torch.testing.assert_close(pipe.state_dict()[key], value, rtol=1e-12, atol=1e-14)


def test_nets_are_used() -> None:
    assert {case.net for case in CASES.values()} == set(NETS)
