"""skorch trains a learner as it trains any module."""

from __future__ import annotations

import pytest
import torch
from client_nets import needed
from torch import nn
from torch.nn import functional as F

import feedbackward as fb

pytestmark = pytest.mark.clients
skorch = needed("skorch")

X = torch.randn(32, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def attached() -> fb.Learner:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    return fb.attach(net.double(), fb.DKP.published(), example=X)


def test_a_classifier_trains_by_the_rule() -> None:
    learner = attached()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(learner(X), Y).backward()
        optimizer.step()
    classifier = skorch.NeuralNetClassifier(
        attached(), criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=0.1, max_epochs=5,
        batch_size=-1, train_split=None, verbose=0, iterator_train__shuffle=False,
    )  # fmt: skip
    classifier.fit(X.numpy(), Y.numpy())
    for name, p in classifier.module_.named_parameters():
        torch.testing.assert_close(p, dict(learner.named_parameters())[name])
    assert classifier.predict(X.numpy()).shape == (32,)
