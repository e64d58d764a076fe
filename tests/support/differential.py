"""Compares a learner on a generated model with the cut oracle. `python tests/support/differential.py 2000` counts refusals."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cut_oracle import Grads, chain_gradients, cut_gradients
from generated import Sample, make_sample
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import feedbackward as fb

RULES: tuple[fb.Rule, ...] = (
    fb.DFA(),
    fb.DKP(operator=fb.Dense()),
    fb.DKP.published(),
    fb.DRTP(),
    fb.DGL(hidden=4),
    fb.KolenPollack(),
)
TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}


def check(seed: int, rule: fb.Rule) -> str:
    """An empty text where all is as the oracle says, else why the model was refused. Raises AssertionError."""
    sample = make_sample(seed)
    model, plain = sample.model, copy.deepcopy(sample.model)
    before, random = look(model, sample), torch.get_rng_state()
    try:
        learner = attached(sample, rule)
    except fb.FeedbackError as error:
        assert look(model, sample) == before, "a refusal left a trace"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        return str(error)
    assert look(model, sample) == before, "attach left a trace"
    assert torch.equal(torch.get_rng_state(), random), "attach drew random numbers"
    if any(site.every for site in learner.sites):
        return "the oracle knows no site of several calls: test_time.py has one that does"
    state = copy.deepcopy(learner.state_dict())
    oracle = chain_gradients if isinstance(rule, fb.KolenPollack) else cut_gradients

    def run(m: nn.Module) -> Tensor:
        torch.manual_seed(seed)
        return taken(call(m, sample.example), sample)

    with torch.no_grad():
        output = run(copy.deepcopy(plain))
    _, expected, feedback = oracle(plain, learner, run, sample.y)
    try:
        passes(learner, sample, "forward", output)
    except fb.FeedbackError as error:
        return str(error)
    compare(learner, plain, expected, feedback)
    assert look(model, sample)["parameters"] == before["parameters"]
    unreached = {name for name, grad in expected.items() if grad is None}
    plan = learner.plan
    assert set(plan.unreached) == unreached, f"unreached: {plan.unreached}, truly {unreached}"
    reached = {n for s in (*plan.segments, plan.head) for n in s.parameters}
    assert reached | unreached == set(expected), "a parameter that is neither reached nor reported"
    for schedule in offered(learner):
        learner.load_state_dict(state)
        learner.zero_grad()
        try:
            passes(learner, sample, schedule, output)
        except fb.FeedbackError as error:
            SCHEDULES[reason(str(error))] += 1
            continue
        compare(learner, plain, expected, feedback)
    learner.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert look(model, sample)["attributes"] == before["attributes"]
    return ""


# why schedules were refused
SCHEDULES: Counter[str] = Counter()


def attached(sample: Sample, rule: fb.Rule) -> fb.Learner:
    sites = sample.sites
    if isinstance(rule, fb.KolenPollack):
        sites = "layers"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fb.attach(
            sample.model, rule, example=sample.example, sites=sites, output=sample.output
        )


def offered(learner: fb.Learner) -> list[str]:
    if isinstance(learner.rule, fb.KolenPollack):
        return []
    return ["eager"] if learner.rule.needs == "target" else ["replay", "replay, kept"]


def passes(learner: fb.Learner, sample: Sample, schedule: str, expected: Tensor) -> None:
    """One training pass, whose loss and output are those of the oracle."""
    learner.target(sample.y)

    def loss_of(output: Any) -> Tensor:
        tensor = taken(output, sample)
        assert torch.equal(tensor.detach(), expected) or schedule == "replay, kept", "other values"
        torch.testing.assert_close(tensor.detach(), expected)
        return F.cross_entropy(tensor.flatten(0, -2), sample.y.flatten())

    torch.manual_seed(sample.seed)
    if schedule == "forward":
        loss_of(call(learner, sample.example)).backward()
    else:
        name, _, kept = schedule.partition(",")
        learner.backward(sample.example, loss_of, name, keep_inputs=bool(kept))


def compare(learner: fb.Learner, plain: nn.Module, expected: Grads, feedback: Grads) -> None:
    own = dict(learner.model.named_parameters())
    for name, grad in expected.items():
        same(name, own[name].grad, grad)
    weights = dict(learner.feedback.named_parameters())
    for name, grad in feedback.items():
        same(f"feedback {name}", weights[name].grad, grad)
    for (name, a), b in zip(learner.model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=f"buffer {name}")


def same(name: str, found: Tensor | None, expected: Tensor | None) -> None:
    if expected is None or found is None:
        nothing = all(t is None or not t.any() for t in (found, expected))
        assert nothing, f"{name}: {'no' if found is None else 'a'} gradient"
        return
    torch.testing.assert_close(found, expected, **TOLERANCE, msg=lambda m: f"{name}: {m}")


def call(model: Callable[..., Any], example: Any) -> Any:
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def taken(output: Any, sample: Sample) -> Tensor:
    return output if sample.output is None else sample.output(output)


def look(model: nn.Module, sample: Sample) -> dict[str, Any]:
    """All that is the user's, to compare."""
    tensors = [t for t in tree_leaves(sample.example) if isinstance(t, Tensor)]
    return {
        "parameters": {n: (p.tolist(), p.requires_grad) for n, p in model.named_parameters()},
        "gradients": [p.grad is None for p in model.parameters()],
        "buffers": {name: b.tolist() for name, b in model.named_buffers()},
        "modes": [m.training for m in model.modules()],
        "example": [t.tolist() for t in tensors],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "passes": [getattr(m, "passes", None) for m in model.modules()],
    }


def reason(message: str) -> str:
    """What kind of refusal it is: the message without names and numbers."""
    return re.sub(r"(?<!\w)'[^']*'|\[[^]]*\]|\d+", "_", message)[:150]


def main(count: int, start: int = 0) -> int:
    """Check so many models under every rule; print what was refused and why."""
    torch.set_num_threads(1)
    refused: dict[str, Counter[str]] = {str(rule): Counter() for rule in RULES}
    odd: dict[str, Counter[str]] = {}
    wrong = 0
    for seed in range(start, start + count):
        for rule in RULES:
            try:
                why = check(seed, rule)
            except Exception as error:
                wrong += 1
                line = str(error).splitlines()[0] if str(error) else ""
                print(
                    f"seed {seed}, {rule.label}, {make_sample(seed).odd}: {type(error).__name__}: {line}"[
                        :300
                    ]
                )
                continue
            if why:
                refused[str(rule)][reason(why)] += 1
                odd.setdefault(reason(why), Counter()).update(make_sample(seed).odd or ["-"])
    for rule, reasons in refused.items():
        print(f"{rule}: {count} models, {sum(reasons.values())} refused")
        for why, number in reasons.most_common():
            print(f"  {number:5d} {why}   {odd[why].most_common(4)}")
    print("schedules refused:")
    for why, number in SCHEDULES.most_common():
        print(f"  {number:5d} {why}")
    print(f"{wrong} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
