"""Random models, wired as people wire them: stacks, residuals, branches, gates, token and map layers, odd calls.

A model is a list of steps that its forward goes through, so that it can be copied. The same seed gives the same model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from generated_parts import Attention, Block, Excite, Halves, Masked, Own, Residual, Shift
from torch import Tensor, nn

CLASSES = 3
# among them names that the library or a plan might use itself
NAMES = [
    "head",
    "output",
    "input",
    "source",
    "model",
    "feedback",
    "plan",
    "rule",
    "sites",
    "layers",
    "the_head",
    "body",
    "fc",
    "conv",
    "block",
    "norm",
    "act",
    "mixer",
    "up",
    "down",
    "proj",
    "out",
    "h",
    "x",
    "weight_",
    "item",
    "first",
    "last",
]


@dataclass
class Sample:
    """A model with what it is fed. `odd`: what was put in that most models do not have."""

    seed: int
    model: nn.Module
    example: Any
    y: Tensor
    output: Callable[[Any], Tensor] | None
    sites: Any
    odd: list[str] = field(default_factory=list)


# what an odd step needs: the kinds of activity that it takes
ODD: dict[str, str] = {
    "shared": "vtm",
    "twice": "vt",
    "unbiased": "vt",
    "own": "vt",
    "mask first": "vt",
    "mask by keyword": "vt",
    "halves": "vt",
    "detached branch": "vtm",
    "no gradient": "vt",
    "frozen": "vtm",
    "unused": "vtm",
    "tied": "vt",
    "flip": "vtm",
    "flip and back": "vtm",
    "turn and back": "t",
    "sort": "vt",
    "reverse tokens": "t",
    "in place": "vtm",
    "recurrent": "t",
    "attention": "t",
    "mixer": "t",
    "times extra": "vtm",
    "transposed": "m",
    "excite": "m",
    "shift": "vtm",
    "join": "vtm",
    "hidden output": "vtm",
    "eval part": "vtm",
}


class Builder:
    """Makes one model."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.seed = seed
        self.batch = self.draw.choice([2, 3, 4, 5, 6])
        self.tokens = self.draw.choice([2, 3, 4])
        self.used: list[str] = []
        self.odd = sorted(self.draw.sample(sorted(ODD), self.draw.choice([0, 0, 1, 1, 2])))

    def sample(self) -> Sample:
        """The model, its inputs and its targets."""
        torch.manual_seed(self.seed)
        draw = self.draw
        kind = draw.choice("vvtmm")
        width = draw.choice([4, 5, 6])
        shape = {"v": (width,), "t": (self.tokens, width), "m": (width, 4, 4)}[kind]
        model = Block()
        at, kind, width = self.grow(model, 0, kind, width, draw.randint(2, 5), top=True)
        at, kind, width = self.close(model, at, kind, width)
        output = self.give(model, at)
        model.double()
        x = torch.randn(self.batch, *shape).double()
        extra = torch.rand(self.batch).double() + 0.5
        # whether a part is there that takes the second input
        given = "times extra" in {operation for operation, _, _ in model.steps}
        example: Any = (x, extra) if given else draw.choice([x, (x,), {"x": x}])
        if given and draw.random() < 0.5:
            example = {"extra": extra, "x": x}
        y = torch.randint(CLASSES, (self.batch, self.tokens) if kind == "t" else (self.batch,))
        return Sample(self.seed, model, example, y, output, self.sites(model), self.odd)

    def grow(
        self, block: Block, at: int, kind: str, width: int, count: int, top: bool = False
    ) -> tuple[int, str, int]:
        """Add so many steps after the result `at`; which result is the last, of what kind and width."""
        at = self.put(block, "call", self.layer(kind, width, width), at)
        for i in range(count):
            free = [name for name in self.odd if kind in ODD[name] and name not in self.used]
            odd = free if top else []
            if odd and (i == count - 1 or self.draw.random() < 0.6):
                name = odd.pop(0)
                self.used.append(name)
                at, width = self.odd_step(block, name, at, kind, width)
                continue
            at = self.step(block, at, kind, width, top)
            if top and kind == "m" and self.draw.random() < 0.2:
                at, kind = self.put(block, "to tokens", None, at), "t"
                self.tokens = 16
        return at, kind, width

    def step(self, block: Block, at: int, kind: str, width: int, top: bool) -> int:
        draw, layer = self.draw, self.layer(kind, width, width)
        choice = draw.randrange(9 if top else 6)
        if choice == 0:
            return self.put(block, draw.choice(["relu", "tanh", "gelu", "half", "drop"]), None, at)
        if choice in (1, 2):
            at = self.put(block, draw.choice(["call", "keyword"]), layer, at)
            return self.put(block, "call", draw.choice([nn.ReLU, nn.Tanh, nn.GELU])(), at)
        if choice == 3:
            return self.put(block, "call", self.norm(kind, width), at)
        if choice == 4:
            inner = [self.norm(kind, width), layer, draw.choice([nn.ReLU(), nn.Identity()])]
            return self.put(block, "call", nn.Sequential(*inner), at)
        if choice == 5:
            return self.put(block, "call", draw.choice([nn.Dropout(0.3), nn.Identity()]), at)
        if choice == 6:
            inner_block = Residual()
            self.grow(inner_block, 0, kind, width, draw.randint(0, 2))
            return self.put(block, "call", inner_block, at)
        low = self.put(block, "call", layer, at)
        if choice == 7:
            return self.put(block, "add", None, self.put(block, "tanh", None, low), at)
        other = self.put(block, "call", self.layer(kind, width, width), at)
        return self.put(block, draw.choice(["add", "gate"]), None, low, other)

    def odd_step(self, block: Block, name: str, at: int, kind: str, width: int) -> tuple[int, int]:
        layer, axis = self.layer(kind, width, width), 1 if kind == "m" else -1
        if name == "shared":
            for _ in range(2):
                at = self.put(block, "tanh", None, self.put(block, "call", layer, at))
        elif name in ("twice", "unbiased", "no gradient"):
            at = self.put(block, name, layer, at)
        elif name == "own":
            at = self.put(block, "call", Own(width), at)
        elif name in ("mask first", "mask by keyword"):
            at = self.put(block, name, Masked(width, width), at)
        elif name == "halves":
            at = self.put(block, "halves", Halves(width), at)
        elif name == "detached branch":
            low = self.put(block, "call", layer, self.put(block, "detach", None, at))
            at = self.put(block, "add", None, low, at)
        elif name == "frozen":
            at = self.put(block, "call", layer.requires_grad_(False), at)
        elif name == "unused":
            self.name(block, layer)
        elif name == "tied":
            at = self.put(block, "call", layer, at)
            other = nn.Linear(width, width)
            other.weight = layer.weight
            at = self.put(block, "call", other, self.put(block, "tanh", None, at))
        elif name == "in place":
            at = self.put(block, "call", nn.ReLU(inplace=True), self.put(block, "call", layer, at))
        elif name == "recurrent":
            at = self.put(block, "recur", nn.GRU(width, width, batch_first=True), at)
        elif name == "attention":
            own = self.draw.random() < 0.5
            attend = nn.MultiheadAttention(width, 1, batch_first=True)
            part = Attention(width) if own else attend
            at = self.put(block, "call" if own else "attend", part, at)
        elif name == "mixer":
            at = self.put(block, "over tokens", nn.Linear(self.tokens, self.tokens), at)
        elif name == "times extra":
            block.steps.append((name, "", (at, 1)))
            at = len(block.steps) + 1
        elif name == "transposed":
            at = self.put(block, "call", nn.ConvTranspose2d(width, width, 3, padding=1), at)
        elif name == "excite":
            at = self.put(block, "call", Excite(width), at)
        elif name == "shift":
            at = self.put(block, "call", Shift(axis, width), at)
        elif name == "join":
            at, width = (
                self.put(block, "join", None, at, self.put(block, "call", layer, at)),
                2 * width,
            )
        elif name == "eval part":
            at = self.put(block, "call", self.norm(kind, width).eval(), at)
        elif name != "hidden output":
            at = self.put(block, name, None, at)
        return at, width

    def close(self, model: Block, at: int, kind: str, width: int) -> tuple[int, str, int]:
        """From an activity to the classes: of each sample, or of each token."""
        draw = self.draw
        if kind == "m" and self.tokens != 16:
            ways = ["mean", "to vector", "pool"]
            way = draw.choice(ways)
            if way == "pool":
                at, way = self.put(model, draw.choice(["pool", "max pool"]), None, at), "mean"
            at = self.put(model, way, None, at)
            kind, width = "v", width * (16 if way == "to vector" else 1)
        elif kind == "t" and draw.random() < 0.6:
            way = draw.choice(["mean", "first token", "to vector"])
            at = self.put(model, way, None, at)
            kind, width = "v", width * (self.tokens if way == "to vector" else 1)
        if draw.random() < 0.5:
            at = self.put(model, "call", nn.Linear(width, 6), at)
            at, width = self.put(model, draw.choice(["relu", "tanh"]), None, at), 6
        at = self.put(model, "call", nn.Linear(width, CLASSES), at)
        if draw.random() < 0.2:
            at = self.put(model, "log softmax", None, at)
        return at, kind, width

    def give(self, model: Block, at: int) -> Callable[[Any], Tensor] | None:
        """The form of the output, and how its tensor is taken from it."""
        if "hidden output" in self.used:
            model.steps.append(("both", "", (at, max(2, at - 1))))
            return _logits
        form = self.draw.choice(["", "", "", "tuple", "dict"])
        if not form:
            return None
        self.put(model, form, None, at)
        return _first if form == "tuple" else _logits

    def sites(self, model: nn.Module) -> Any:
        """Mostly the layers; also the other ways to say it."""
        chance = self.draw.random()
        if chance < 0.6:
            return "layers"
        if chance < 0.75:
            return self.draw.choice(["blocks", "stages", "every-2", "every-2"])
        names = [name for name, _ in model.named_children()]
        return sorted(self.draw.sample(names, min(len(names), self.draw.randint(1, 3))))

    def layer(self, kind: str, width: int, out: int) -> nn.Module:
        if kind != "m":
            return nn.Linear(width, out, bias=self.draw.random() < 0.8)
        if self.draw.random() < 0.2:
            return nn.Conv2d(width, out, 1)
        mode = self.draw.choice(["zeros", "zeros", "reflect"])
        return nn.Conv2d(width, out, 3, padding=1, padding_mode=mode)

    def norm(self, kind: str, width: int) -> nn.Module:
        if kind == "v":
            return self.draw.choice([nn.BatchNorm1d, nn.LayerNorm])(width)
        if kind == "t":
            return self.draw.choice([nn.LayerNorm, nn.RMSNorm])(width)
        return self.draw.choice([nn.BatchNorm2d(width), nn.GroupNorm(1, width)])

    def put(self, block: Block, operation: str, part: nn.Module | None, *taken: int) -> int:
        """Add a step; the number of its result."""
        name = "" if part is None else self.name(block, part)
        block.steps.append((operation, name, taken))
        return len(block.steps) + 1

    def name(self, block: Block, part: nn.Module) -> str:
        """Give a part a name; one that is there already keeps its own."""
        for name, child in block.named_children():
            if child is part:
                return name
        name = self.draw.choice(NAMES)
        while hasattr(block, name):
            name += str(self.draw.randrange(10))
        block.add_module(name, part)
        return name


def _first(output: Any) -> Tensor:
    return output[0]


def _logits(output: Any) -> Tensor:
    return output["logits"]


def make_sample(seed: int) -> Sample:
    """The model of this seed."""
    return Builder(seed).sample()
