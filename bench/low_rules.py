"""The small CNN with tanh in place of ReLU: `feedbackward train --model bench/low_rules.py:tanh_cnn --rule drtp ...`.

What DRTP does on a bounded activation: bench/results/low_rules.md has the commands and the numbers.
"""

from torch import nn

from feedbackward.experiment.nets.small_cnn import SmallCNN


def tanh_cnn(in_shape: tuple[int, int, int], classes: int, norm: bool = True) -> nn.Module:
    """The DKP authors' small CNN with bounded activities."""
    net = SmallCNN(in_shape, classes, norm)
    for block in (net.block1, net.block2, net.block3):
        block.relu = nn.Tanh()
    return net
