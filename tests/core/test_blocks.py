"""`sites="blocks"`: which modules of a net are its blocks, decided by hand for every shape of net."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb

WIDTH = 6


class Layer(nn.Module):
    """A layer with its activation: composed, and no block of its own."""

    def __init__(self, width: int = WIDTH, out: int | None = None) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(width, out or width), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


class Gate(nn.Module):
    """Squeeze and excite: its input times a number for each of its features."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x))))


class Block(nn.Module):
    """`skip(x) + scale * gate(f(x))`; the skip path is a projection where it is told so."""

    def __init__(self, project: bool = False, gate: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(Layer(), Layer())
        self.gate = Gate() if gate else nn.Identity()
        self.skip = nn.Linear(WIDTH, WIDTH) if project else nn.Identity()
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.scale * self.gate(self.body(x))


class Stage(nn.Module):
    """A projection, then blocks in a run; it returns something else than the last block made."""

    def __init__(self, blocks: int = 2, project: bool = True) -> None:
        super().__init__()
        self.down = Layer() if project else nn.Identity()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        for block in self.blocks:
            x = block(x)
        return x * 1.0


class Plain(nn.Module):
    """A stage of a run without skip paths; it returns something else than the last one made."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Layer(), Layer())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) * 1.0


class Reduction(nn.Module):
    """A part of its input beside what it computes, as a branch that only pools."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Layer(out=3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(x), x[:, :3]], 1)


class Inception(nn.Module):
    """Parallel branches, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Sequential(Layer(out=3)), nn.Sequential(Layer(), Layer(out=3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], 1)


class Parallel(nn.Module):
    """Two branches of residual blocks, which it returns both."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(Block(), Block()) for _ in range(2))
        self.mixers = nn.ModuleList(nn.Sequential(Layer()) for _ in range(2))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        a, b = (branch(x) for branch, x in zip(self.branches, xs, strict=True))
        return [a + self.mixers[0](b), b + self.mixers[1](a)]


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parallel = nn.ModuleList([Parallel(), Parallel()])

    def forward(self, x: Tensor) -> Tensor:
        xs = [x, 2 * x]
        for part in self.parallel:
            xs = part(xs)
        return xs[0] + xs[1]


class Tied(nn.Module):
    """One block is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 1, 1, 2):
            x = self.blocks[i](x)
        return x


class Net(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.stem = Layer(4, WIDTH)
        for name, part in parts.items():
            self.add_module(name, part)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


# net, and the blocks that a reader would name
NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "attributes": (lambda: Net(a=Block(), b=Block()), ["a", "b"]),
    "a run": (lambda: Net(run=nn.Sequential(Block(), Block())), ["run.0", "run.1"]),
    "projected shortcuts": (
        lambda: Net(a=Block(True), b=Block(), c=Block(True), d=Block()),
        ["a", "b", "c", "d"],
    ),
    "gates": (
        lambda: Net(a=Block(True, True), b=Block(gate=True), c=Block(True, True)),
        ["a", "b", "c"],
    ),
    "gates, and projected shortcuts alone": (
        lambda: Net(a=Block(True, True), b=Block(True, True)),
        ["stem", "a", "b"],
    ),
    "a run with another class": (
        lambda: Net(run=nn.Sequential(Layer(), Block(), Block())),
        ["run.0", "run.1", "run.2"],
    ),
    "another run without residuals": (
        lambda: Net(patches=nn.Sequential(Layer(), Layer()), run=nn.Sequential(Block(), Block())),
        ["run.0", "run.1"],
    ),
    "runs of runs": (
        lambda: Net(run=nn.Sequential(nn.Sequential(Layer()), nn.Sequential(Block(), Block()))),
        ["run.0.0", "run.1.0", "run.1.1"],
    ),
    "stages": (
        lambda: Net(stages=nn.Sequential(Stage(project=False), Stage(), Stage(1))),
        [f"stages.{i}.blocks.{j}" for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))],
    ),
    "stages of which one has no residual blocks": (
        lambda: Net(stages=nn.Sequential(Stage(), Plain())),
        ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.1.blocks.1"],
    ),
    "parallel branches": (
        lambda: Net(split=Split()),
        [f"split.parallel.{i}.branches.{j}.{k}" for i in (0, 1) for j in (0, 1) for k in (0, 1)],
    ),
    "a block called twice": (lambda: Net(tied=Tied()), ["tied.blocks.0", "tied.blocks.2"]),
    "inception": (
        lambda: Net(a=Inception(), b=Inception(), c=Inception()),
        ["stem", "a", "b", "c"],
    ),
    "inception with branches that pool": (
        lambda: Net(a=Inception(), b=Reduction(), c=Inception(), d=Reduction()),
        ["stem", "a", "b", "c", "d"],
    ),
    "inception in a run": (
        lambda: Net(run=nn.Sequential(Layer(), Inception(), Inception())),
        ["run.0", "run.1", "run.2"],
    ),
    "plain runs": (
        lambda: nn.Sequential(Layer(4, WIDTH), Layer(), Layer(), nn.Linear(WIDTH, 3)),
        ["0", "1", "2"],
    ),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.whole
def test_blocks_are_what_a_reader_would_name(name: str) -> None:
    make, expected = NETS[name]
    learner = fb.attach(make(), fb.DFA(), example=torch.randn(5, 4), sites="blocks")
    assert [site.name for site in learner.sites] == expected


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_a_gate_is_no_skip_path(gate: bool, project: bool) -> None:
    """Whatever the shortcut is, the block is found and not its gate."""
    model = Net(a=Block(project, gate), b=Block(), c=Block(project, gate))
    learner = fb.attach(model, fb.DFA(), example=torch.randn(5, 4), sites="blocks")
    assert [site.name for site in learner.sites] == ["a", "b", "c"]


def test_no_class_repeats() -> None:
    with pytest.raises(fb.AttachError, match="could be named instead: stem, a"):
        fb.attach(Net(a=Inception()), fb.DFA(), example=torch.randn(5, 4), sites="blocks")
