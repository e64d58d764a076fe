"""Local learning by synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph
from feedbackward.rule import Rule
from feedbackward.rules.local.heads import Reader, count_classes, local_losses


@dataclass(frozen=True)
class LLS(Rule):
    r"""LLS: every segment is trained to make its activity swing with a fixed wave of its class.

    .. math::
        L_l = \mathrm{CE}\bigl(\tfrac1\tau\, \hat z_l\, B_l^\top M_l, y\bigr), \qquad
        \hat z_l = z_l / \lVert z_l \rVert, \quad z_l = \mathrm{pool}(h_l): [N, n_l], \qquad
        B_{l, ci} = \sin(f_c\, i)

    with frequencies :math:`f_c` evenly spaced from 50 to 512, and maps averaged down to `side` x `side`, also where a flatten
    made a vector of them. `B` is never stored beside its formula, nothing is transported, and no error travels between
    segments. The part above the last site learns by the network's own loss.

    Call `learner.target(y)` with class indices before every forward pass; what multiplies the loss goes into its `scale`.

    side: of the pooled maps. temperature: :math:`\tau`.
    modulation: M, learned by the same loss: `"none"`, no M; `"class"`, a factor for each class (LLS-M); `"mix"`, a matrix
        `[C, C]` (LLS-MxM). Both start near zero, as the authors' do.

    Apolinario, Roy & Frenkel, "LLS: Local Learning Rule for Deep Neural Networks Inspired by Neural Activity
    Synchronization", WACV 2025 (arXiv:2405.15868). From the authors' code: sines of these frequencies, where the paper has
    cosines; the normalised activity; side 4. The authors use leaky ReLU and batch norm.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.LLS(), example=x)
        >>> learner.target(y)
        >>> F.cross_entropy(learner(x), y).backward()
        >>> all(p.grad is not None for p in learner.parameters())
        True
    """

    side: int = 4
    temperature: float = 1.0
    modulation: Literal["none", "class", "mix"] = "none"

    name = "lls"
    label = "LLS"
    paper = "Apolinario et al. 2025"
    needs = "target"
    linear = False
    unlocked = "update"

    def __post_init__(self) -> None:
        if self.side < 1 or self.temperature <= 0:
            raise AttachError(f"{self.label} needs side >= 1 and temperature > 0, got {self}.")
        if self.modulation not in ("none", "class", "mix"):
            raise AttachError(
                f'{self.label} has no modulation {self.modulation!r}: use "none", "class" or "mix".'
            )

    @property
    def learned(self) -> bool:  # type: ignore[override]
        return self.modulation != "none"

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return local_losses(self, sites, source)

    def auxiliary(self, site: Site, source: Source) -> nn.Module:
        classes = count_classes(self.label, site, source)
        space = tuple(min(self.side, n) for n in site.map[1:])
        return _Waves(Reader(site, source, space), classes, self)

    def local_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target.flatten())


class _Waves(nn.Module):
    """The scores of the classes by their waves."""

    waves: Tensor

    def __init__(self, reader: Reader, classes: int, rule: LLS) -> None:
        super().__init__()
        self.reader, self.temperature = reader, rule.temperature
        frequencies = torch.linspace(50, 512, classes, dtype=torch.float64)
        places = torch.arange(reader.width, dtype=torch.float64)
        waves = torch.sin(torch.outer(frequencies, places))
        self.register_buffer("waves", waves.float())
        sizes = {"none": None, "class": (classes,), "mix": (classes, classes)}
        size = sizes[rule.modulation]
        self.modulation = None if size is None else nn.Parameter(0.01 * torch.randn(size))

    def forward(self, h: Tensor) -> Tensor:
        scores = F.normalize(self.reader(h), dim=1) @ self.waves.t()
        if self.modulation is not None:
            mixed = self.modulation.dim() == 2
            scores = scores @ self.modulation if mixed else scores * self.modulation
        return scores / self.temperature
