"""Give the feedback weights a rate and a decay of their own."""

import torch
import torch.nn.functional as F
from torch import nn

import feedbackward as fb

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
x = torch.randn(256, 20)
y = (x @ torch.randn(20, 5)).argmax(1)

learner = fb.attach(model, fb.DKP(), example=x)
groups = fb.param_groups(
    learner,
    model={"lr": 0.05, "weight_decay": 5e-4},
    feedback={"lr": 0.005, "weight_decay": 0.0},
)
optimizer = torch.optim.SGD(groups, momentum=0.9)
for group in optimizer.param_groups:
    print(f"{len(group['params'])} tensors: lr {group['lr']}, decay {group['weight_decay']}")

losses = []
for _ in range(100):
    optimizer.zero_grad()
    loss = F.cross_entropy(learner(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]
