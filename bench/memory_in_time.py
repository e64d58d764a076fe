"""Memory against the length of a sequence: cuts in time, with the sequence in pieces, beside backprop through time.

python bench/memory_in_time.py > bench/results/memory_in_time.md

The most bytes of tensors alive during a step, counted from birth to death, besides the sequence, weights and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb
from feedbackward.experiment.training.measure import activation_bytes

BATCH, INPUTS, WIDTH, CLASSES, PIECE = 8, 16, 64, 10, 16
LENGTHS = (64, 256, 1024)
CPU = torch.device("cpu")


class Tagger(nn.Module):
    """A GRU that runs step by step, and a class at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = fb.unroll(nn.GRU(INPUTS, WIDTH, batch_first=True))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h, state = self.rnn(x, state)
        return self.head(h), state


def in_pieces(learner: nn.Module, x: Tensor, y: Tensor) -> None:
    """The gradient of a sequence, piece by piece: no gradient crosses a step, so it is that of the whole."""
    state = None
    for piece, labels in zip(x.split(PIECE, 1), y.split(PIECE, 1), strict=True):
        output, state = learner(piece, state)
        state = state.detach()
        loss = F.cross_entropy(output.flatten(0, 1), labels.flatten(), reduction="sum")
        (loss / y.numel()).backward()


def whole(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Backprop through time."""
    F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).backward()


def measured(length: int) -> tuple[int, int]:
    """Bytes of cuts in time and of backprop through time."""
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, length, INPUTS), torch.randint(CLASSES, (BATCH, length))
    model = Tagger()
    learner = fb.attach(
        model, fb.DKP(), example=x[:, :PIECE], sites=["rnn.steps.0"], output=lambda out: out[0]
    )
    found = []
    for step in (lambda: in_pieces(learner, x, y), lambda: _exact(learner, x, y)):
        step()
        held = [x, y, *learner.parameters(), *learner.buffers()]
        found.append(activation_bytes(step, held, learner.parameters(), CPU))
    return found[0], found[1]


def _exact(learner: fb.Learner, x: Tensor, y: Tensor) -> None:
    with learner.exact():
        whole(learner, x, y)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    rows = {length: measured(length) for length in LENGTHS}
    print("# Memory against the length of a sequence\n")
    print(
        f"`python bench/memory_in_time.py`: a GRU of width {WIDTH}, {BATCH} sequences, DKP at every step, in pieces of {PIECE} "
        "steps with the state detached between them. Activations alive at once, at most, in KiB; the sequence itself, "
        "weights and gradients are not counted.\n"
    )
    print("| steps | cuts in time, in pieces | backprop through time |")
    print("|---|---|---|")
    for length, (pieces, through) in rows.items():
        print(f"| {length:,} | {pieces / 1024:,.0f} | {through / 1024:,.0f} |")
    first, last = rows[LENGTHS[0]], rows[LENGTHS[-1]]
    pieces, through = (b / a for a, b in zip(first, last, strict=True))
    print(
        f"\nFrom {LENGTHS[0]} to {LENGTHS[-1]:,} steps: {pieces:.2f} times in pieces, {through:.1f} times by backprop."
    )


if __name__ == "__main__":
    main()
