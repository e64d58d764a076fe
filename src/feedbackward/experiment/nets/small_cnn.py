"""The small convolutional net on which Direct Kolen-Pollack was published."""

from torch import nn

from feedbackward.experiment.nets.blocks import Shape, conv_block, linear_block

PUBLISHED_SITES = ("block1.relu", "block2.relu", "block3.relu")


class SmallCNN(nn.Sequential):
    """conv3x3-32, conv3x3-32, max-pool, fc-128, fc-classes: [N, *in_shape] -> [N, classes].

    Convolutions are unpadded and followed by batch norm and ReLU; the linear layers have no norm.
    PyTorch's default initialisation, as in the authors' code (Webster, Choi and Ahn 2020, dkp-gist).
    Their feedback enters *before* the max-pool: [N, 32, 30, 30], [N, 32, 28, 28] and [N, 128] on 32 px.
    """

    def __init__(self, in_shape: Shape, classes: int, norm: bool = True) -> None:
        super().__init__()
        channels, height, width = in_shape
        features = 32 * ((height - 4) // 2) * ((width - 4) // 2)
        after = {"pool": nn.MaxPool2d(2), "flatten": nn.Flatten()}
        self.block1 = conv_block((channels, 32), norm, kernel_size=3)
        self.block2 = conv_block((32, 32), norm, after, kernel_size=3)
        self.block3 = linear_block((features, 128))
        self.head = nn.Linear(128, classes)
