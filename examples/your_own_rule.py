"""Write a rule of your own: DFA that clips the error. On the command line: `--rule your_own_rule:ClippedDFA`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackward as fb


@dataclass(frozen=True)
class ClippedDFA(fb.Rule):
    """DFA that sends the error clipped to [-limit, limit] in units of 1/N."""

    limit: float = 0.5

    name = "clipped_dfa"
    label = "clipped DFA"
    paper = "an example"
    # a signal that is clipped does not grow with the loss, so a loss scale is refused
    linear = False
    # no signal waits for another one
    unlocked = "backward"

    def graph(self, sites: Sequence[fb.Site], source: fb.Source) -> fb.Graph:
        """Send the source's error to every site, through dense weights."""
        return fb.star(sites, source, fb.Dense())

    def message(
        self, edge: fb.Edge, d: Tensor, target: Tensor | None, activity: Tensor | None
    ) -> Tensor:
        """What the edge carries instead of the error `d`, which holds the 1/N of a mean loss."""
        limit = self.limit / len(d)
        return d.clamp(-limit, limit)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )
    x = torch.randn(256, 20)
    y = (x @ torch.randn(20, 5)).argmax(1)
    learner = fb.attach(model, ClippedDFA(), example=x)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.cross_entropy(learner(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]
