"""A chain feeds every layer that multiplies its input by one matrix, of whatever class it is and however the matrix is stored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb
from feedbackward.errors import AttachError

X = torch.randn(8, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

ROWS = {
    "linear": F.linear,
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w.t()).view(*x.shape[:-1], -1),
    "matmul": lambda x, w, b: x @ w.mT + b,
}
# as GPT-2 of transformers has it
COLUMNS = {
    "addmm of columns": lambda x, w, b: torch.addmm(b, x.view(-1, x.shape[-1]), w).view(*x.shape[:-1], -1),
    "matmul of columns": lambda x, w, b: b + x @ w,
    "linear of columns": lambda x, w, b: F.linear(x, w.t(), b),
}  # fmt: skip


class Own(nn.Module):
    """A linear layer that is no `nn.Linear`."""

    def __init__(self, like: nn.Linear, form: str) -> None:
        super().__init__()
        self.kernel = nn.Parameter(
            like.weight.detach().clone().t().contiguous()
            if form in COLUMNS
            else like.weight.detach()
        )
        self.offset = nn.Parameter(like.bias.detach())
        self.form = {**ROWS, **COLUMNS}[form]

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.kernel, self.offset)


class Net(nn.Module):
    """Layers with a skip, norms and a square matrix, whose shape does not say which side the inputs are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.norm, self.head = nn.LayerNorm(9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        h = h + self.b(h).tanh().reshape(h.shape)
        return self.head(self.norm(self.c(h)).relu())


def made(form: str | None = None) -> Net:
    torch.manual_seed(0)
    net = Net().double()
    for name, layer in list(net.named_children()):
        if form and isinstance(layer, nn.Linear):
            setattr(net, name, Own(layer, form))
    return net


def columns(form: str, t: Tensor) -> Tensor:
    return t.t() if form in COLUMNS and t.dim() == 2 else t


RULES: list[Callable[[], fb.Rule]] = [
    fb.rules.FA, fb.KolenPollack, fb.rules.USF, fb.rules.FRSF, fb.rules.WeightMirror,
    fb.rules.SymmetricAlignment, lambda: fb.rules.HighwayKP(branches=1),
]  # fmt: skip


@pytest.mark.parametrize("form", [*ROWS, *COLUMNS])
@pytest.mark.parametrize("rule", RULES, ids=lambda make: type(make()).__name__)
def test_signals_and_feedback_are_those_of_linear_layers(
    rule: Callable[[], fb.Rule], form: str
) -> None:
    plain, own = fb.attach(made(), rule(), example=X), fb.attach(made(form), rule(), example=X)
    assert len(own.sites) == len(plain.sites) == 3
    mine, theirs = (each.feedback.state_dict(keep_vars=True) for each in (own, plain))
    assert mine.keys() == theirs.keys()
    with torch.no_grad():
        for name, b in mine.items():
            b.copy_(columns(form, theirs[name]))
    for learner in (plain, own):
        learner(X).square().mean().backward()
    pairs = [(mine[name].grad, theirs[name].grad) for name in mine]
    pairs += [
        (p.grad, q.grad)
        for p, q in zip(own.model.parameters(), plain.model.parameters(), strict=True)
    ]
    for found, expected in pairs:
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(columns(form, found), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", COLUMNS)
def test_feedback_of_columns_begins_as_the_layer_does(form: str) -> None:
    """The mirrored start estimates the matrix as it is stored, and a random one has the width of the inputs."""
    net = made(form)
    learner = fb.attach(net, fb.KolenPollack(init="mirrored"), example=X)
    for b, layer in zip(learner.feedback.parameters(), (net.b, net.c, net.head), strict=True):
        assert F.cosine_similarity(b.flatten(), layer.kernel.detach().flatten(), dim=0) > 0.95
    operator = fb.operators.LayerShaped(
        fb.operators.LayerForm((300, 4), transposed=True), "like_layer"
    )
    (b,) = operator.create((4,), (300,), torch.Generator().manual_seed(0))
    assert 0.9 * 300**-0.5 < b.abs().max() <= 300**-0.5


REFUSED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "scaled": lambda x, w, b: 2 * F.linear(x, w) + b,
    "scaled within": lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w.t(), alpha=2).view(*x.shape[:-1], -1),
    "with a skip": lambda x, w, b: F.linear(x, w, b) + x,
    "turned": lambda x, w, b: F.linear(x.mT.reshape(x.shape), w, b),
    "of a function of the input": lambda x, w, b: F.linear(x.sin(), w, b),
    "in heads": lambda x, w, b: F.linear(x, w, b).unflatten(2, (2, 3)),
    "twice": lambda x, w, b: F.linear(F.linear(x, w), w, b),
    "of the square": lambda x, w, b: F.linear(x, w * w, b),
    "of a masked matrix": lambda x, w, b: F.linear(x, w * torch.ones(6, 6).triu().to(w), b),
    "of a normed matrix": lambda x, w, b: x @ F.normalize(w.t(), dim=0) + b,
    "across rows": lambda x, w, b: (x.flatten(0, 1).t().reshape(-1, 6) @ w).view(x.shape) + b,
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_plain_product_is_refused_by_name(form: str) -> None:
    net = made("linear")
    net.b.form = REFUSED[form]
    with pytest.raises(AttachError, match=r"'b'"):
        fb.attach(net, fb.rules.FA(), example=X)


class Kept(nn.Module):
    """A net whose activations change what its layers return, or leave it."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace),
            nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.0, inplace), nn.LeakyReLU(0.1, inplace),
            nn.Conv2d(4, 4, 1), nn.ReLU(inplace), nn.Flatten(),
            nn.Linear(64, 6), nn.ELU(inplace=inplace), nn.Linear(6, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


@pytest.mark.parametrize("rule", RULES, ids=lambda make: type(make()).__name__)
def test_an_activation_in_place_changes_nothing(rule: Callable[[], fb.Rule]) -> None:
    x, found = torch.randn(4, 2, 4, 4, dtype=torch.float64), []
    for inplace in (False, True):
        torch.manual_seed(0)
        learner = fb.attach(Kept(inplace).double(), rule(), example=x)
        learner(x).square().mean().backward()
        found.append({name: p.grad for name, p in learner.named_parameters()})
        assert [site.name for site in learner.sites] == [f"layers.{i}.input" for i in (2, 5, 8, 10)]
    plain, changed = found
    for name, grad in plain.items():
        assert (grad is None) == (changed[name] is None)
        if grad is not None:
            torch.testing.assert_close(changed[name], grad, rtol=1e-10, atol=1e-12)
