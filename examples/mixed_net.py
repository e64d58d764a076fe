"""Mix rules in one network: the convolutions learn by backprop, the linear layers by DKP."""

import torch
import torch.nn.functional as F
from torch import nn

import feedbackward as fb

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3),
    nn.ReLU(),
    nn.Conv2d(8, 8, 3),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(128, 32),
    nn.ReLU(),
    nn.Linear(32, 4),
)
x = torch.randn(128, 1, 8, 8)
y = torch.stack([q.mean((1, 2, 3)) for q in (x[:, :, :4, :4], x[:, :, :4, 4:])], 1)
y = 2 * (y[:, 0] > 0) + (y[:, 1] > 0)


def is_map(site: fb.Site) -> bool:
    return len(site.shape) == 3


# the first pattern that matches a site decides; a site of BP is not cut
rule = fb.Mixed({is_map: fb.BP(), "*": fb.DKP()})
learner = fb.attach(model, rule, example=x)
print(learner)
assert all(not is_map(site) for site in learner.graph.sites)

optimizer = torch.optim.SGD(learner.parameters(), lr=0.02, momentum=0.9)
losses = []
for _ in range(100):
    optimizer.zero_grad()
    loss = F.cross_entropy(learner(x), y.long())
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]
