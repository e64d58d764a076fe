"""A layout that can crash on some CPUs is warned of, and no other."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from feedbackward.experiment.training.building import warn_of_channels_last

CPU = torch.device("cpu")


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 8), (8, 12), (8, 4), (12, 16)])
def test_a_strided_1x1_convolution_of_odd_width_is_named(inputs: int, outputs: int) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(inputs, outputs, 1, stride=2))
    with pytest.warns(UserWarning, match=r"'1' is a strided 1x1 convolution.*multiples of 8"):
        warn_of_channels_last(model, CPU)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(8, 16, 1, stride=2), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, stride=2)],
    ids=repr,
)
def test_others_are_not(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_channels_last(nn.Sequential(layer), CPU)
        warn_of_channels_last(nn.Conv2d(4, 6, 1, stride=2), torch.device("cuda"))
