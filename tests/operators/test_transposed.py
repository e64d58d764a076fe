"""Transposed convolutions that are called with `output_size`: with B = W a chain is backprop."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import feedbackward as fb

CONVS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}
FORMS: list[dict[str, Any]] = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 3},
    {"kernel_size": 2, "stride": 2, "groups": 2},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
]  # fmt: skip


class Net(nn.Module):
    def __init__(self, dims: int, form: dict[str, Any]) -> None:
        super().__init__()
        conv, transposed = CONVS[dims]
        down = {key: value for key, value in form.items() if key not in ("output_padding",)}
        self.down, self.up = conv(2, 4, **down), transposed(4, 4, **form)
        self.out = conv(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(self.down(x).tanh(), output_size=list(x.shape[2:])).tanh())


def difference(net: Net, learner: fb.Learner, x: Tensor) -> float:
    """The largest difference to backprop, over the largest gradient."""
    parameters = list(net.parameters())
    found = torch.autograd.grad(learner(x).square().sum(), parameters)
    with learner.exact():
        expected = torch.autograd.grad(learner(x).square().sum(), parameters)
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_chain_with_the_true_weights_is_backprop_for_every_size(
    dims: int, form: dict[str, Any]
) -> None:
    """One learner for batches of several sizes: each call chooses its own output padding."""
    torch.manual_seed(0)
    net = Net(dims, form).double()
    sizes = [torch.randn(3, 2, *[size] * dims).double() for size in (7, 8, 9)]
    learner = fb.attach(net, fb.rules.FA(), example=sizes[1])
    with torch.no_grad():
        for edge in learner.graph.edges:
            learner.feedback_of(edge).copy_(net.get_parameter(edge.site.weight))
    for x in sizes:
        try:
            net(x)
        except ValueError:  # a size that this form cannot make
            continue
        assert difference(net, learner, x) < 1e-12


@pytest.mark.parametrize("rule", [fb.rules.FA(), fb.rules.KolenPollack()], ids=str)
@pytest.mark.parametrize(
    ("dtype", "size"),
    list(itertools.product([torch.float64, torch.float32, torch.bfloat16], [7, 8])),
)
def test_every_dtype_has_finite_gradients(rule: fb.Rule, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    net, x = Net(2, FORMS[0]).to(dtype), torch.randn(3, 2, size, size).to(dtype)
    learner = fb.attach(net, rule, example=x)
    learner(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
