"""The targets of a pass, for rules that send them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from feedbackward.errors import FeedbackError


@dataclass(frozen=True)
class Target:
    """`raw`: class indices `[N, ...]`, or targets of the source's own shape. `scale`: a factor on all signals of the pass."""

    raw: Tensor
    scale: float = 1.0

    def one_hot(self, source: Tensor, tokens: int) -> Tensor:
        """The targets in the source's shape, times the scale. `tokens`: how many of its dimensions are token dimensions.

        Raises FeedbackError where they do not fit it.
        """
        y, shape = self.raw, source.shape
        if y.is_floating_point():
            if y.shape != shape:
                raise FeedbackError(
                    f"learner.target got targets of shape {list(y.shape)} for a source of shape {list(shape)}: give the same shape, "
                    "or class indices."
                )
            return y.to(source.dtype) * self.scale
        axis = self._class_axis(y, source, tokens)
        # by comparison, so that a label outside the classes (ignore_index) sends nothing, without waiting for the device
        classes = torch.arange(shape[axis], device=y.device)
        return (y.unsqueeze(-1) == classes).movedim(-1, axis).to(source.dtype) * self.scale

    def _class_axis(self, y: Tensor, source: Tensor, tokens: int) -> int:
        """The dimension of the classes: 1 for [N, C] and maps [N, C, H, W], the last for tokens [N, T, C]."""
        shape, last = list(source.shape), source.dim() - 1
        # with as many time steps as classes both axes fit; the kind of the source decides
        for axis in (last, 1) if tokens else (1, last):
            if list(y.shape) == shape[:axis] + shape[axis + 1 :]:
                return axis
        raise FeedbackError(
            f"learner.target got class indices of shape {list(y.shape)} for a source of shape {shape}: they must lack its class "
            "dimension only."
        )
