"""What the three sign-concordant chains of Moskovitz et al. share: they differ in where the magnitudes come from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from feedbackward.activity import LayerInput, Site, Source
from feedbackward.graph import Graph
from feedbackward.operators.layer import LayerShaped
from feedbackward.operators.signed import Signed
from feedbackward.rule import Rule, refuse_zeros
from feedbackward.topologies import chain


@dataclass(frozen=True)
class SignConcordant(Rule):
    """A chain whose feedback has the signs of the forward weights. Abstract: uSF, brSF and frSF say what the magnitudes are."""

    init: str = "xavier_uniform"
    scale: float = 1.0
    follow_norm: bool = False

    paper = "Moskovitz et al. 2019"
    feeds = LayerInput
    transport = "signs"

    def __post_init__(self) -> None:
        refuse_zeros(self.label, self)

    def graph(self, sites: Sequence[Site], source: Source) -> Graph:
        def signed(layer_input: LayerInput) -> Signed:
            return self.signed(LayerShaped(layer_input.form, self.init, self.scale))

        return chain(sites, signed, with_forward_weight=True)

    @abstractmethod
    def signed(self, layer: LayerShaped) -> Signed:
        """The operator of one layer."""
