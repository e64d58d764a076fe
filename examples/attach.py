"""Train a small convolutional net by DKP: one line is added to an ordinary training loop."""

import torch
import torch.nn.functional as F
from torch import nn

import feedbackward as fb

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1),
    nn.BatchNorm2d(8),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(8 * 4 * 4, 32),
    nn.ReLU(),
    nn.Linear(32, 4),
)
# four classes of images: one bright quadrant each, under noise
labels = torch.arange(256) % 4
images = torch.randn(256, 1, 8, 8)
for image, label in zip(images, labels.tolist(), strict=True):
    row, column = 4 * (label // 2), 4 * (label % 2)
    image[:, row : row + 4, column : column + 4] += 1.0

learner = fb.attach(model, fb.DKP(), example=images[:32])
print(learner)

optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
for epoch in range(5):
    for x, y in zip(images.split(32), labels.split(32), strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(learner(x), y)
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")

plain = learner.detach().eval()
accuracy = (plain(images).argmax(1) == labels).float().mean().item()
print(f"training accuracy {accuracy:.2f}")
assert accuracy > 0.8
