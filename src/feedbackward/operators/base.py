"""What a feedback operator must offer. Operators are frozen dataclasses; the weights are passed in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Operator(ABC):
    """The form of a feedback connection. It holds hyper-parameters only, never tensors.

    Shapes: the error `d` is `[M, *source]` (M = batch, or batch x tokens; C = the size of `source`), an activity `h`
    is `[M, *site]`. `sized` operators fit the shapes they were created for only.
    """

    sized: ClassVar[bool] = True

    @abstractmethod
    def create(self, size: int, site: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Initial weights `B` for an edge from `size` = C units to a site of that shape, float32, on CPU."""

    @abstractmethod
    def send(self, B: Tensor, d: Tensor, site: tuple[int, ...]) -> Tensor:
        """The teaching signal `[M, *site]` of the error `d: [M, *source]`."""

    @abstractmethod
    def correlate(self, B: Tensor, d: Tensor, h: Tensor, center: bool) -> Tensor:
        """The outer product `d^T h` in the form of `B`; `center` subtracts the mean of `h` over M first."""
