"""Channel-wise competitive learning, a convolutional form of Forward-Forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feedbackward.activity import Site, Source
from feedbackward.errors import AttachError
from feedbackward.graph import Graph
from feedbackward.rule import Rule
from feedbackward.rules.local.heads import Reader, count_classes, local_losses


@dataclass(frozen=True)
class CwComp(Rule):
    r"""CwComp: every class owns a group of a segment's channels, and the group of the right class must be the most active.

    .. math::
        L_l = \mathrm{CE}(G_l / \tau,\, y), \qquad
        G_{l, c} = \frac{1}{|S_c| P} \sum_{k \in S_c} \sum_{p} h_{l, kp}^2

    :math:`S_c` are the channels of class c, a run of :math:`n_l / C` of them (runs differ by one channel where C does not divide
    :math:`n_l`), and p counts the P positions of a map. This goodness is Forward-Forward's; other classes take the place of
    its negative samples, so there is one pass, and no label in the input. There is no weight beside the network's own, and no
    error travels between segments. What lies above the last site learns by the network's own loss and predicts, which
    is the authors' softmax predictor.

    Call `learner.target(y)` with class indices before every forward pass; what multiplies the loss goes into its `scale`.
    A site needs as many channels (or features) as there are classes.

    temperature: :math:`\tau`.

    Papachristodoulou, Kyrkou, Timotheou & Theocharides, "Convolutional Channel-wise Competitive Learning for the
    Forward-Forward Algorithm", AAAI 2024 (arXiv:2312.12668), after Hinton, "The Forward-Forward Algorithm", 2022
    (arXiv:2212.13345). The authors cut after convolution, ReLU, pool and batch norm, in this order, let every second
    convolution have a group of input channels for each class, and train by Adam at 0.01. Without batch norm activities grow without
    bound, so the rate must be small (0.05 was too large for a small convolutional net, 0.005 was not). On MLPs it was not
    above frozen features in our tries. Inferred: runs of unequal size,
    and features of vectors and tokens in place of channels.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.rules.CwComp(), example=x)
        >>> learner.target(y)
        >>> F.cross_entropy(learner(x), y).backward()
        >>> all(p.grad is not None for p in model.parameters())
        True
    """

    temperature: float = 1.0

    name = "cwcomp"
    label = "CwComp"
    paper = "Papachristodoulou et al. 2024"
    needs = "target"
    linear = False
    unlocked = "update"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise AttachError(f"{self.label} needs a temperature above 0, got {self.temperature}.")

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        return local_losses(self, sites, source)

    def auxiliary(self, site: Site, source: Source) -> nn.Module:
        classes = count_classes(self.label, site, source)
        shape = site.map
        reader = Reader(site, source, (1,) * len(shape[1:]))
        if reader.width < classes:
            raise AttachError(
                f"{self.label} gives every class channels of its own, but site {site.name!r} has {reader.width} for {classes} "
                "classes: name wider sites with `sites=`, or use DGL, predsim or LLS."
            )
        return _Goodness(reader, classes, self.temperature)

    def local_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target.flatten())


class _Goodness(nn.Module):
    """The mean square of each class's channels, `[N, C]`."""

    share: Tensor

    def __init__(self, reader: Reader, classes: int, temperature: float) -> None:
        super().__init__()
        self.reader, self.temperature = reader, temperature
        owner = torch.arange(reader.width) * classes // reader.width
        owned = F.one_hot(owner, classes).float()
        self.register_buffer("share", owned / owned.sum(0))

    def forward(self, h: Tensor) -> Tensor:
        return self.reader(h.square()) @ self.share / self.temperature
