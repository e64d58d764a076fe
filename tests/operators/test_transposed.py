"""Transposed convolutions of every size, and called with `output_size`: feedback goes back as autograd itself would."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
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


DTYPES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2}
GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, list[list[int]]]:
    """A layer of 4 to 6 channels, plain or transposed, and the space of two of its inputs."""
    dims, transposed = draw(st.integers(1, 3)), draw(st.booleans())

    def each(least: int, most: list[int]) -> list[int]:
        return [draw(st.integers(least, end)) for end in most]

    kernel, stride, dilation = (each(1, [3] * dims) for _ in range(3))
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    form: dict[str, Any] = {
        "stride": stride,
        "dilation": dilation,
        "groups": draw(st.integers(1, 2)),
    }
    form["padding"] = each(0, [r // 2 for r in reach])
    if transposed:
        form["output_padding"] = each(
            0, [max(pair) - 1 for pair in zip(stride, dilation, strict=True)]
        )
    else:
        form["padding_mode"] = draw(st.sampled_from(["zeros", "circular", "replicate"]))
    spaces = [each(1 + max(reach), [5 + max(reach)] * dims) for _ in range(2)]
    return CONVS[dims][transposed](4, 6, kernel, **form), spaces


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).sum(2)


@examples(60, 1000)
@given(made=convolutions(), dtype=st.sampled_from(sorted(DTYPES, key=str)))
def test_kernel_feedback_is_the_adjoint_of_its_layer_for_every_size(
    made: tuple[Any, list[list[int]]], dtype: torch.dtype
) -> None:
    """What autograd sends back from a constant error, for inputs of the example's size and of another one."""
    layer, spaces = made
    below = CONVS[len(spaces[0])][0](2, 4, 1)
    net = nn.Sequential(below, layer, Sum(), nn.Linear(6, 3)).to(dtype)
    inputs = [torch.randn(3, 2, *space).to(dtype) for space in spaces]
    learner = fb.attach(net, fb.rules.KernelDFA(), example=inputs[0], sites=["1"])
    names = [*GEOMETRY, "output_padding"] if layer.transposed else GEOMETRY
    own = {name: getattr(layer, name) for name in names}
    alike = type(layer)(4, 3, **own, bias=False).double()
    with torch.no_grad():
        alike.weight.copy_(learner.feedback_of(learner.graph.edges[0]))
    for x in inputs:
        (found,) = torch.autograd.grad(learner(x).square().sum(), [below.weight])
        h = below(x).detach().double().requires_grad_()
        out = alike(h).flatten(2)
        error = 2 * net(x).detach().double()
        (signal,) = torch.autograd.grad(out, h, error.unsqueeze(2).expand_as(out))
        expected = torch.einsum("mcp,mip->ci", signal.flatten(2), x.double().flatten(2))
        assert (found.double().flatten(1) - expected).norm() <= DTYPES[dtype] * expected.norm()


def test_kernel_feedback_refuses_an_output_size_that_it_cannot_know() -> None:
    """An input of one size may have outputs of several."""
    net = nn.Sequential(Net(2, FORMS[0]), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(fb.errors.AttachError, match=r"'0\.up\.input'.*output_size"):
        fb.attach(net, fb.rules.KernelDFA(), example=torch.randn(3, 2, 8, 8))
