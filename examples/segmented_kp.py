"""Segmented KP: chains of three layers, each of which hears of the error directly: three products in sequence at any depth."""

import torch
import torch.nn.functional as F
from torch import nn

import feedbackward as fb

torch.manual_seed(0)
layers: list[nn.Module] = [nn.Linear(20, 48), nn.BatchNorm1d(48), nn.ReLU()]
for _ in range(5):
    layers += [nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU()]
model = nn.Sequential(*layers, nn.Linear(48, 5))
x = torch.randn(256, 20)
y = (x @ torch.randn(20, 5)).argmax(1)

learner = fb.attach(model, fb.SegmentedKP(steps=3), example=x)
print(learner)
print("products in sequence:", fb.count_cost(learner, x).steps)

# B is updated by the optimizer and the rate of W
optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
losses = []
for _ in range(100):
    optimizer.zero_grad()
    loss = F.cross_entropy(learner(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]
