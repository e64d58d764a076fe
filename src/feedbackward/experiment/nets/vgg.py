"""VGG nets with batch norm, in the form used for images of 28 to 64 px."""

from torch import nn

from feedbackward.experiment.nets.blocks import Shape, conv_block, kaiming_convs, linear_block

Stages = tuple[tuple[int, ...], ...]

STAGES_6: Stages = ((32, 32), (64, 64), (128, 128))
STAGES_11: Stages = ((64,), (128,), (256, 256), (512, 512), (512, 512))
STAGES_13: Stages = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))
STAGES_16: Stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Sequential):
    """Stages of 3x3 convolutions and a max-pool, then linear layers: [N, *in_shape] -> [N, classes].

    `stages` are the widths of the convolutions of each stage, `hidden` those of the hidden linear layers.
    Simonyan and Zisserman 2015, configurations A, B and D, with batch norm after every convolution; for
    small images the two hidden linear layers have 512 units instead of 4096. There is no dropout: batch norm
    regularises, and Launay et al. 2019 advise little or no dropout with direct feedback. Pools round up, so
    that 28 px (28, 14, 7, 4, 2, 1) survive five of them. He initialisation of convolutions.
    """

    def __init__(
        self,
        in_shape: Shape,
        classes: int,
        norm: bool = True,
        *,
        stages: Stages,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__()
        width, height, breadth = in_shape
        count = 0
        for stage, outs in enumerate(stages, start=1):
            for position, out in enumerate(outs, start=1):
                after: dict[str, nn.Module] = {}
                if position == len(outs):
                    after["pool"] = nn.MaxPool2d(2, ceil_mode=True)
                    if stage == len(stages):
                        after["flatten"] = nn.Flatten()
                count += 1
                block = conv_block((width, out), norm, after, kernel_size=3, padding=1)
                self.add_module(f"block{count}", block)
                width = out
            height, breadth = (height + 1) // 2, (breadth + 1) // 2
        width *= height * breadth
        for out in hidden:
            count += 1
            self.add_module(f"block{count}", linear_block((width, out)))
            width = out
        self.head = nn.Linear(width, classes)
        kaiming_convs(self)
