"""`sites="layers"`: a layer is what multiplies an activity with a weight of its own, of whatever class it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb
from feedbackward.errors import AttachError

FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "transposed": lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w.t()).unflatten(
        0, x.shape[:-1]
    ),
    "matmul": lambda x, w, b: x @ w.t() + b,
    "scaled": lambda x, w, b: 2 * F.linear(x / 2, w) + b,
}


class Own(nn.Module):
    """A linear layer that is no `nn.Linear`."""

    def __init__(self, like: nn.Linear, form: str) -> None:
        super().__init__()
        self.weight, self.bias = like.weight, like.bias
        self.form = FORMS[form]

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.weight, self.bias)


class Net(nn.Module):
    """Layers with a skip and two layers that take one activity."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        h = h + self.b(h).tanh() * self.c(h)
        return self.head(h)


def made(form: str | None) -> nn.Module:
    torch.manual_seed(0)
    net = Net().double()
    for name, layer in list(net.named_children()) if form else []:
        setattr(net, name, Own(layer, str(form)))
    return net


def gradients(net: nn.Module, x: Tensor, rule: fb.Rule) -> tuple[list[str], dict[str, Tensor]]:
    learner = fb.attach(net, rule, example=x)
    learner(x).square().mean().backward()
    return [s.name for s in learner.sites], {
        n: p.grad for n, p in learner.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("shape", [(8, 4), (8, 5, 4)], ids=["rows", "tokens"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", [fb.DFA(), fb.DKP.published()], ids=["dfa", "dkp"])
def test_the_class_of_a_layer_changes_no_site_and_no_gradient(
    rule: fb.Rule, form: str, shape: tuple[int, ...]
) -> None:
    x = torch.randn(*shape, dtype=torch.float64)
    sites, expected = gradients(made(None), x, rule)
    found_sites, found = gradients(made(form), x, rule)
    assert found_sites == sites == ["b.input", "head.input"]
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12)


class Table(nn.Module):
    """Its parameters are added, multiplied number by number and picked, and never meet an activity in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.gate = nn.Parameter(torch.randn(1, 6)), nn.Parameter(torch.randn(1, 6))
        self.table = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate + self.shift + self.table[: len(x)]


def test_a_weight_without_a_product_makes_no_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Table(), nn.Tanh(), nn.Linear(6, 3))
    learner = fb.attach(model, fb.DFA(), example=torch.randn(8, 4))
    assert [site.name for site in learner.sites] == ["3"]
    with pytest.raises(AttachError, match="no module of the model multiplies"):
        fb.attach(nn.Sequential(Table(), nn.Tanh()), fb.DFA(), example=torch.randn(8, 6))


class Product(nn.Module):
    """It owns a table, and multiplies activities with each other alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.t()) @ x / 8 + self.table


def test_a_product_of_activities_makes_no_layer() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.mix, self.head = nn.Linear(4, 6), Product(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(self.a(x)).tanh())

    from feedbackward.model.trace import trace

    found = [c.name for c in trace(Rows(), torch.randn(8, 4)).calls if c.is_layer]
    assert found == ["a", "head"]


class Recurrent(nn.Module):
    """Two recurrent layers, of which the second begins in the state of the first."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool = True) -> None:
        super().__init__()
        self.one, self.two = (
            kind(4, 6, batch_first=batch_first),
            kind(6, 6, batch_first=batch_first),
        )  # type: ignore[call-arg, arg-type]
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, state = self.one(x)
        h, _ = self.two(h, state)
        out: Tensor = self.head(h)
        return out


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_are_layers(kind: type[nn.RNNBase]) -> None:
    """Their output sequences are the sites: the gradients are those of the error times B at each of them."""
    torch.manual_seed(0)
    net, x = Recurrent(kind).double(), torch.randn(8, 5, 4, dtype=torch.float64)
    learner = fb.attach(net, fb.DFA(), example=x)
    assert [site.name for site in learner.sites] == ["one", "two"]
    out = learner(x)
    out.square().mean().backward()
    error = 2 * out.detach() / out.numel()
    found = {name: p.grad for name, p in net.named_parameters()}
    below, above = learner.feedback.state_dict().values()
    h, state = net.one(x)
    # the state is no site: what it carries goes on by backprop
    g, _ = net.two(h.detach(), state)
    loss = (h * (error @ below).detach()).sum() + (g * (error @ above).detach()).sum()
    loss = loss + (net.head(g.detach()) * error).sum()
    for name, expected in zip(
        found, torch.autograd.grad(loss, list(net.parameters())), strict=True
    ):
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_a_recurrent_layer_with_the_time_first_is_no_layer() -> None:
    with pytest.raises(AttachError, match=r"Recurrent layers count if .* batch_first=True"):
        fb.attach(Recurrent(nn.GRU, batch_first=False), fb.DFA(), example=torch.randn(5, 8, 4))


class OwnConvolution(nn.Module):
    """A convolution that is no `nn.Conv2d`."""

    def __init__(self, like: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


@pytest.mark.parametrize(
    "rule", [fb.DFA(), fb.DKP(), fb.DKP.published()], ids=["dfa", "dkp", "published"]
)
def test_the_class_of_a_convolution_changes_nothing(rule: fb.Rule) -> None:
    """The default DKP whitens channels: it must know which dimension they are."""

    def net(own: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 5, 3, padding=1),
        ]
        wrapped = [OwnConvolution(layer) if own else layer for layer in layers]
        parts = [part for layer in wrapped for part in (layer, nn.Tanh())]
        return nn.Sequential(*parts, nn.Flatten(), nn.Linear(5 * 16, 3)).double()

    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    sites, expected = gradients(net(False), x, rule)
    found_sites, found = gradients(net(True), x, rule)
    assert len(sites) == 3
    assert found_sites == sites
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12)
