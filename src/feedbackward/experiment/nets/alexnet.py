"""AlexNet with batch norm, the larger net of the Direct Kolen-Pollack code."""

from torch import nn

from feedbackward.experiment.nets.blocks import Shape, conv_block, linear_block

PUBLISHED_SITES = (
    "block1.pool",
    "block2.pool",
    "block3.relu",
    "block4.relu",
    "block5.drop",
    "block6.drop",
    "block7.relu",
)

# longest side up to which the form is used, the first convolution's options, width of the linear layers
_FORMS = (
    (48, {"kernel_size": 5, "stride": 1, "padding": 2}, 1024),
    (96, {"kernel_size": 7, "stride": 2, "padding": 3}, 2048),
    (None, {"kernel_size": 11, "stride": 4, "padding": 2}, 4096),
)


def _map_side(side: int, stem: dict[str, int]) -> int:
    """Side of the feature map after the fifth convolution's pool."""
    side = (side + 2 * stem["padding"] - stem["kernel_size"]) // stem["stride"] + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    return side


class AlexNet(nn.Sequential):
    """Five convolutions (64-192-384-256-256) and three linear layers: [N, *in_shape] -> [N, classes].

    Above 96 px it is torchvision's AlexNet ("one weird trick", Krizhevsky 2014) with batch norm after every
    convolution, none in the linear layers, and dropout 0.5 before the first two of them, as in dkp-gist.
    Two smaller forms are ours: up to 48 px the first convolution is 5x5 with stride 1, up to 96 px 7x7 with
    stride 2, so that 32 and 64 px give the same maps (15, 7, 7, 7, 3 px), with linear layers of 1024 and 2048
    units instead of 4096. The average pool gives 6 x 6, or the map itself where that is smaller.
    PyTorch's default initialisation.
    """

    def __init__(self, in_shape: Shape, classes: int, norm: bool = True) -> None:
        super().__init__()
        channels, height, width = in_shape
        stem, units = next(
            (s, u) for top, s, u in _FORMS if top is None or max(height, width) <= top
        )
        grid = (min(6, _map_side(height, stem)), min(6, _map_side(width, stem)))
        top = {
            "pool": nn.MaxPool2d(3, 2),
            "avgpool": nn.AdaptiveAvgPool2d(grid),
            "flatten": nn.Flatten(),
            "drop": nn.Dropout(0.5),
        }
        self.block1 = conv_block((channels, 64), norm, {"pool": nn.MaxPool2d(3, 2)}, **stem)
        self.block2 = conv_block(
            (64, 192), norm, {"pool": nn.MaxPool2d(3, 2)}, kernel_size=5, padding=2
        )
        self.block3 = conv_block((192, 384), norm, kernel_size=3, padding=1)
        self.block4 = conv_block((384, 256), norm, kernel_size=3, padding=1)
        self.block5 = conv_block((256, 256), norm, top, kernel_size=3, padding=1)
        self.block6 = linear_block((256 * grid[0] * grid[1], units), {"drop": nn.Dropout(0.5)})
        self.block7 = linear_block((units, units))
        self.head = nn.Linear(units, classes)
