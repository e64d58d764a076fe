"""Measure the angle between a rule's teaching signals and backprop's, before and after training."""

import torch
import torch.nn.functional as F
from torch import nn

import feedbackward as fb

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
x = torch.randn(256, 20)
y = (x @ torch.randn(20, 5)).argmax(1)


def loss_fn(output: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, y)


learner = fb.attach(model, fb.KolenPollack(), example=x)
before = fb.probe(learner, loss_fn, x)

# equal rates and equal weight decay bring the feedback weights to the forward weights
optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, weight_decay=0.05)
for _ in range(400):
    optimizer.zero_grad()
    loss_fn(learner(x)).backward()
    optimizer.step()
after = fb.probe(learner, loss_fn, x)

print(after)
for name, last in after.sites.items():
    first = before.sites[name]
    print(f"{name}: {first.angle:.1f} degrees before training, {last.angle:.1f} after")
    assert last.angle < first.angle
