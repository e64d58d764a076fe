"""VGG-16 whose lowest convolutions are frozen: the control of a rule whose lower layers hear of the error by other ways."""

from torch import nn

from feedbackward.experiment import nets
from feedbackward.experiment.nets.blocks import Shape


def vgg16(in_shape: Shape, classes: int, norm: bool = True, blocks: int = 10) -> nn.Module:
    """The first `blocks` convolutions keep their random weights; their batch norms still see the batch."""
    model = nets.build("vgg16", in_shape, classes, norm)
    for block in range(1, blocks + 1):
        model.get_submodule(f"block{block}").requires_grad_(False)
    return model
