"""Train a model in place, with a loop that knows nothing of rules: the model itself trains by DKP."""

import torch
import torch.nn.functional as F
from torch import nn

import feedbackward as fb


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor):
    """Anybody's training loop."""
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )
    x = torch.randn(256, 20)
    y = (x @ torch.randn(20, 5)).argmax(1)
    learner = fb.attach(model, fb.DKP(), example=x, in_place=True)
    # the feedback weights learn too, so the optimizer gets them beside the model's
    optimizer = torch.optim.SGD(fb.param_groups(learner), lr=0.05, momentum=0.9)
    losses = train(model, optimizer, x, y)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] / 2
    # the model as it was, with the weights that it learned
    model = learner.detach()
