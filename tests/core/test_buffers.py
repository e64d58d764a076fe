"""`attach` leaves buffers as they were, whatever a first forward pass does with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import feedbackward as fb


class Layer(nn.Module):
    """A layer between two others that keeps something of what it has seen."""

    def __init__(self, start: Callable[[Layer], None], step: Callable[[Layer, Tensor], Tensor]):
        super().__init__()
        self.step = step
        start(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def resize(m: Layer, x: Tensor) -> Tensor:
    if not m.seen.numel():
        m.seen.resize_(x.shape[1:]).copy_(x.detach().amin(0))
    m.seen.copy_(torch.minimum(m.seen, x.detach().amin(0)))
    return x


def replace(m: Layer, x: Tensor) -> Tensor:
    m.seen = x.detach().amax(0)
    return x


def from_none(m: Layer, x: Tensor) -> Tensor:
    m.seen = x.detach().mean(0) if m.seen is None else m.seen + 1
    return x - m.seen


def create(m: Layer, x: Tensor) -> Tensor:
    if not hasattr(m, "seen"):
        m.register_buffer("seen", x.detach().mean(0))
    return x - m.seen


def create_and_say_so(m: Layer, x: Tensor) -> Tensor:
    if not m.ready:
        m.register_buffer("seen", x.detach().mean(0))
        m.ready = True
    return x - m.seen


def grow(m: Layer, x: Tensor) -> Tensor:
    m.seen.resize_(len(m.seen) + 1).fill_(1)
    return x


def shrink(m: Layer, x: Tensor) -> Tensor:
    m.seen.resize_(2)
    return x


def count(m: Layer, x: Tensor) -> Tensor:
    m.seen += 1
    return x / m.seen


def empty(m: Layer) -> None:
    m.register_buffer("seen", torch.tensor([]))


def none(m: Layer) -> None:
    m.register_buffer("seen", None)


def ones(m: Layer) -> None:
    m.register_buffer("seen", torch.ones(6))


def flag(m: Layer) -> None:
    m.ready = False


LAYERS = {
    "resized from empty": (empty, resize),
    "replaced": (ones, replace),
    "replaced, of another size": (empty, replace),
    "None before": (none, from_none),
    "created": (lambda m: None, create),
    "created, with a flag": (flag, create_and_say_so),
    "grows": (ones, grow),
    "shrinks": (ones, shrink),
    "counts": (ones, count),
    "not persistent": (lambda m: m.register_buffer("seen", torch.ones(6), persistent=False), count),
}
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def net(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), Layer(*LAYERS[name]), nn.ReLU(), nn.Linear(6, 3))


def state(model: nn.Module) -> dict[str, Tensor | None]:
    found = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            found[f"{path}.{name}"] = None if buffer is None else buffer.clone()
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_attach_changes_no_buffer_and_training_goes_on_as_without(name: str) -> None:
    plain, model = net(name), net(name)
    before, own = state(model), dict(model.named_buffers())
    learner = fb.attach(model, fb.DFA(), example=X)
    after = state(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key] is None if value is None else torch.equal(after[key], value), key
    assert all(dict(model.named_buffers())[n] is b for n, b in own.items())
    for _ in range(3):
        assert torch.equal(learner(X), plain(X))


@pytest.mark.parametrize(
    "layers",
    [
        lambda: (nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3)),
        lambda: (nn.Linear(4, 6), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Linear(6, 3)),
    ],
)
def test_lazy_layers_are_refused_until_they_have_run(
    layers: Callable[[], tuple[nn.Module, ...]],
) -> None:
    model = nn.Sequential(*layers())
    with pytest.raises(fb.FeedbackError, match="lazy"):
        fb.attach(model, fb.DFA(), example=X)
    model(X)
    fb.attach(model, fb.DFA(), example=X)(X).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("made", ["parameter", "module", "deep", "in place of another"])
def test_what_the_first_pass_makes_is_refused_and_taken_away(made: str) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Sequential(nn.Linear(4, 6)), nn.Linear(6, 3)
            self.scale, self.done = None, False
            self.register_parameter("bias", None)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            if not self.done:
                self.done = True
                if made == "parameter":
                    self.bias = nn.Parameter(torch.ones(3))
                elif made == "module":
                    self.scale = nn.Linear(6, 6)
                elif made == "deep":
                    self.a.append(nn.Linear(6, 6))
                else:
                    self.out = nn.Linear(6, 3)
            return self.out(h if self.scale is None else self.scale(h))

    model = Late()
    before = dict(model.named_modules()), dict(model.named_parameters())
    with pytest.raises(fb.FeedbackError, match="is made in the first forward pass"):
        fb.attach(model, fb.DFA(), example=X)
    assert (dict(model.named_modules()), dict(model.named_parameters())) == before
    assert not model.done
    model(X)
    fb.attach(model, fb.DFA(), example=X)(X).square().sum().backward()


def test_a_parent_that_notes_the_new_buffer_forgets_it_too() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child, self.out, self.ready = nn.Linear(4, 6), nn.Linear(6, 3), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.child(x)
            if not self.ready:
                self.child.register_buffer("scale", torch.ones(6))
                self.ready = True
            return self.out(torch.tanh(h * self.child.scale))

    model, x = Parent(), torch.randn(5, 4)
    learner = fb.attach(model, fb.DFA(), example=x, sites=["child"])
    assert not model.ready
    assert "scale" not in dict(model.child.named_buffers())
    learner(x).sum().backward()
    assert model.ready
