"""No two rules are the same by accident: after two steps their hidden gradients differ, for every pair of `RULES`."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import OrderedDict

import pytest
import torch
from steps import train
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb

# pairs of rules whose gradients are the same by theory, and why
EQUAL: dict[frozenset[str], str] = {
    frozenset(("kp", "relayed_kp")): "a net of at most six layers has a relay for every layer",
    frozenset(("kp", "segmented_kp")): "a net of at most six layers is one segment",
    frozenset(("relayed_kp", "segmented_kp")): "both are Kolen-Pollack on these nets",
    frozenset(("segmented_kp", "highway_kp")): "both are Kolen-Pollack on these nets",
    frozenset(("kp", "highway_kp")): "no path of these nets passes more than two branches",
    frozenset(("relayed_kp", "highway_kp")): "both are Kolen-Pollack on these nets",
}


def conv() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(2, 4, 3, padding=1), act1=nn.ReLU(), conv2=nn.Conv2d(4, 4, 3, padding=1), act2=nn.ReLU(),
            conv3=nn.Conv2d(4, 4, 3, padding=1), act3=nn.ReLU(), flat=nn.Flatten(), fc1=nn.Linear(64, 8), act4=nn.ReLU(),
            fc2=nn.Linear(8, 7), act5=nn.ReLU(), head=nn.Linear(7, 3),
        )
    )  # fmt: skip


def mlp() -> nn.Module:
    """For rules that want nothing but an activation between two layers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(32, 9),
        nn.Tanh(),
        nn.Linear(9, 8),
        nn.Tanh(),
        nn.Linear(8, 7),
        nn.Tanh(),
        nn.Linear(7, 3),
    )


class Residual(nn.Module):
    """For rules that follow skip paths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(32, 8), nn.Linear(8, 3)
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1))
        h = self.act1(h + self.b(F.relu(self.a(h))))
        return self.head(self.act2(h + self.d(F.relu(self.c(h)))))


NETS = {"conv": conv, "mlp": mlp, "residual": Residual}


@functools.cache
def hidden_gradients(rule: str, net: str, steps: int = 3) -> Tensor | str:
    """Of the last step, all but the last layer's, as one vector; or why the net is refused."""
    torch.manual_seed(0)
    model = NETS[net]().double()
    x, y = torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.arange(8) % 3
    try:
        with warnings.catch_warnings():
            # a rule that says it is another one here
            warnings.filterwarnings("error", message=".*follows skip paths")
            learner = fb.attach(model, fb.RULES[rule](), example=x)
    except (fb.AttachError, UserWarning) as reason:
        return str(reason)
    last = [f"{name}." for name, _ in model.named_children()][-1]
    found = train(learner, x, y, F.cross_entropy, steps)
    return torch.cat(
        [
            (torch.zeros_like(model.get_parameter(n)) if g is None else g).flatten()
            for n, g in found.items()
            if not n.startswith(last)
        ]
    )


@pytest.mark.parametrize("rule", fb.RULES)
def test_every_rule_takes_one_of_the_nets(rule: str) -> None:
    found = [hidden_gradients(rule, net) for net in NETS]
    assert any(isinstance(gradient, Tensor) for gradient in found), found
    assert all(gradient.isfinite().all() for gradient in found if isinstance(gradient, Tensor))


@pytest.mark.parametrize("rule", fb.RULES)
def test_it_differs_from_every_other(rule: str) -> None:
    names = list(fb.RULES)
    for other in names[names.index(rule) + 1 :]:
        pairs = [(hidden_gradients(rule, net), hidden_gradients(other, net)) for net in NETS]
        a, b = next(
            (pair for pair in pairs if all(isinstance(gradient, Tensor) for gradient in pair)),
            (None, None),
        )
        if a is None:  # no net takes both
            assert "highway_kp" in (rule, other), (rule, other, pairs)
            continue
        scale = max(a.abs().max(), b.abs().max())
        same = bool((a - b).abs().max() <= 1e-6 * scale)
        assert same == (frozenset((rule, other)) in EQUAL), f"{rule} and {other}"


def test_why_after_some_steps() -> None:
    """Before any update DKP sends nothing: its feedback starts from zero."""
    gradient = hidden_gradients("dkp", "conv", 1)
    assert isinstance(gradient, Tensor)
    assert not gradient.any()


def test_pairs_that_are_equal_are_rules() -> None:
    assert set(itertools.chain(*EQUAL)) <= set(fb.RULES)
