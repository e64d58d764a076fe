"""Train with the activations of one segment in memory at a time, for the same gradients."""

import torch
import torch.nn.functional as F
from torch import nn

import feedbackward as fb

torch.manual_seed(0)
layers: list[nn.Module] = []
for _ in range(8):
    layers += [nn.Linear(32, 32), nn.ReLU()]
model = nn.Sequential(*layers, nn.Linear(32, 5)).double()
x, y = torch.randn(64, 32, dtype=torch.float64), torch.randint(5, (64,))

learner = fb.attach(model, fb.DFA(), example=x)


def gradients(schedule: str) -> list[torch.Tensor]:
    learner.zero_grad()
    learner.backward(x, lambda output: F.cross_entropy(output, y), schedule=schedule)
    return [p.grad.clone() for p in learner.parameters() if p.grad is not None]


joint, replay = gradients("joint"), gradients("replay")
for expected, got in zip(joint, replay, strict=True):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)

cost = fb.count_cost(learner, x)
print("bytes of activations held, by schedule:", cost.held)
