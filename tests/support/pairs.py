"""Small networks, each as a torch module and as the hand-written layers of `oracles`; and how to watch a learner."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import oracles
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb

F64 = torch.float64


class TokenMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@dataclass(frozen=True)
class Pair:
    """`cuts`: the modules whose outputs must be found as sites, in forward order. `sites`, `error_at`: for attach."""

    name: str
    build: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    labels: tuple[int, ...]  # shape of the labels without the batch
    classes: int
    cuts: tuple[str, ...]
    sites: object = "layers"
    error_at: str | None = None

    def __str__(self) -> str:
        return self.name

    def model(self, seed: int = 0) -> nn.Sequential:
        torch.manual_seed(seed)
        model = self.build().to(F64)
        for module in model.modules():  # affine parameters that matter
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
        return model

    def batch(self, size: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(size, *self.shape, generator=generator, dtype=F64)
        return x, torch.randint(self.classes, (size, *self.labels), generator=generator)

    def head(self) -> list[str]:
        """The parameters above the last cut."""
        layers = list(self.build().named_children())
        last = [name for name, _ in layers].index(self.cuts[-1])
        return [
            f"{name}.{key}"
            for name, module in layers[last + 1 :]
            for key, _ in module.named_parameters()
        ]

    def attach(
        self, rule: fb.Rule, model: nn.Module | None = None, **options: object
    ) -> fb.Learner:
        model = self.model() if model is None else model
        kept = {"sites": self.sites, "error_at": self.error_at, **options}
        return fb.attach(model, rule, example=self.batch()[0], **kept)  # type: ignore[arg-type]

    def mirror(self, model: nn.Sequential) -> oracles.Net:
        """The same network in NumPy, split after each cut."""
        segments: dict[str, list[oracles.Layer]] = {}
        layers: list[oracles.Layer] = []
        head: list[oracles.Layer] | None = None
        for name, module in model.named_children():
            layers.append(mirrored(name, module))
            if name in self.cuts:
                segments[name], layers = layers, []
            if name == self.error_at:
                head, layers = layers, []
        return (
            oracles.Net(segments, layers) if head is None else oracles.Net(segments, head, layers)
        )


def mirrored(name: str, module: nn.Module) -> oracles.Layer:
    values = {key: p.detach().numpy().copy() for key, p in module.named_parameters()}
    if isinstance(module, nn.Linear):
        return oracles.Linear(name, **values)
    if isinstance(module, nn.Conv2d):
        return oracles.Conv(name, module.stride[0], module.padding[0], module.groups, **values)  # type: ignore[arg-type]
    if isinstance(module, nn.BatchNorm2d):
        return oracles.Norm(name, (0, 2, 3), 1, **values)
    if isinstance(module, nn.LayerNorm):
        return oracles.Norm(name, (-1,), -1, **values)
    plain = {
        nn.ReLU: "ReLU",
        nn.Tanh: "Tanh",
        nn.MaxPool2d: "MaxPool",
        nn.Flatten: "Flatten",
        TokenMean: "TokenMean",
    }
    return getattr(oracles, plain[type(module)])(name)


def _mlp() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(7, 6), act1=nn.ReLU(), fc2=nn.Linear(6, 5), act2=nn.Tanh(),
            fc3=nn.Linear(5, 6), act3=nn.ReLU(), head=nn.Linear(6, 3),
        )
    )  # fmt: skip


def _conv() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(2, 4, 3, stride=1, padding=1), bn1=nn.BatchNorm2d(4), act1=nn.ReLU(), pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), bn2=nn.BatchNorm2d(6), act2=nn.ReLU(),
            flat=nn.Flatten(), fc1=nn.Linear(24, 5), act3=nn.ReLU(), head=nn.Linear(5, 3),
        )
    )  # fmt: skip


def _tokens() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            embed=nn.Linear(3, 6), norm1=nn.LayerNorm(6), fc1=nn.Linear(6, 4), act1=nn.ReLU(),
            fc2=nn.Linear(4, 5), act2=nn.Tanh(), head=nn.Linear(5, 7),
        )
    )  # fmt: skip


def _vit() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            embed=nn.Linear(3, 6), norm1=nn.LayerNorm(6), fc1=nn.Linear(6, 4), act1=nn.ReLU(),
            pool=TokenMean(), head=nn.Linear(4, 3),
        )
    )  # fmt: skip


MLP = Pair("mlp", _mlp, (7,), (), 3, ("act1", "act2", "act3"))
CONV = Pair("conv", _conv, (2, 8, 8), (), 3, ("pool1", "flat", "act3"))
BEFORE_POOL = Pair(
    "conv-before-pool",
    _conv,
    (2, 8, 8),
    (),
    3,
    ("act1", "act2", "act3"),
    sites=["act1", "act2", "act3"],
)
HIDDEN = Pair("mlp-hidden-error", _mlp, (7,), (), 3, ("act1", "act2"), error_at="fc3")
ACTIVITY = Pair("mlp-activity-error", _mlp, (7,), (), 3, ("act1",), error_at="act2")
CONV_HIDDEN = Pair("conv-hidden-error", _conv, (2, 8, 8), (), 3, ("pool1",), error_at="conv2")
TOKENS = Pair("tokens", _tokens, (5, 3), (5,), 7, ("norm1", "act1", "act2"))
VIT = Pair("vit", _vit, (5, 3), (), 3, ("norm1", "pool"))
PAIRS = (MLP, CONV, BEFORE_POOL, HIDDEN, ACTIVITY, CONV_HIDDEN, TOKENS, VIT)


def loss_fn(labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Mean cross-entropy over samples, and tokens where there are any."""
    return lambda output: F.cross_entropy(output.flatten(0, -2), labels.flatten())


def signals(
    learner: fb.Learner, x: Tensor, y: Tensor, loss: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor | None]:
    """Run one forward and backward pass, and see which gradient arrives at each site's own tensor."""
    met: dict[str, Tensor] = {}
    handles = []
    for site in learner.sites:
        for point in site.points:
            handles.append(_watch(learner.model.get_submodule(point.module), point, site.name, met))
    value = (loss or loss_fn(y))(learner(x))
    for handle in handles:
        handle.remove()
    value.backward()
    return {name: None if h.grad is None else h.grad.clone() for name, h in met.items()}


def step(learner: fb.Learner, x: Tensor, y: Tensor) -> None:
    """One backward pass and, where the rule has one, one phase."""
    loss_fn(y)(learner(x)).backward()
    if learner.attached.in_phase:
        learner.feedback_step(x, loss_fn(y))


def _watch(module: nn.Module, point, name: str, met: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    calls = iter(range(1 << 20))

    def keep(h: Tensor) -> None:
        if h.requires_grad:
            h.retain_grad()
            met[name] = h

    if point.kind == "output":
        return module.register_forward_hook(lambda m, args, out: keep(out), prepend=True)
    return module.register_forward_pre_hook(
        lambda m, args: keep(args[0]) if next(calls) == point.call else None, prepend=True
    )


def grads(module: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()
    }


def exact_grads(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    """Backprop's gradients of a copy of the model."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    loss_fn(y)(twin(x)).backward()
    return grads(twin)


def assert_close(
    got: Tensor | None,
    expected: np.ndarray | Tensor | None,
    what: str = "",
    tolerance: float = 1e-11,
) -> None:
    """Equal to `tolerance`, absolutely and relative to the largest entry; None only equals None."""
    if expected is None or got is None:
        assert got is None, f"{what}: a gradient where there must be none"
        assert expected is None, f"{what}: no gradient"
        return
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} for {tuple(expected.shape)}"
    difference = (got - expected).abs().max().item()
    assert difference <= tolerance * max(1.0, expected.abs().max().item()), (
        f"{what}: off by {difference:.2e}"
    )
