"""Divide a net over processes that run their backward passes at the same time.

torchrun --nproc-per-node 2 examples/pipeline.py    # or 3; `python examples/pipeline.py` uses one
"""

import torch
import torch.nn.functional as F
from torch import nn

import feedbackward as fb

# the same on every process: net, data, order of batches
torch.manual_seed(0)
layers = []
for _ in range(4):
    layers += [nn.Linear(64, 64), nn.ReLU()]
model = nn.Sequential(*layers, nn.Linear(64, 4))
labels = torch.arange(256) % 4
images = torch.randn(256, 64)
for image, label in zip(images, labels.tolist(), strict=True):
    image[16 * label : 16 * label + 16] += 1.0

with fb.parallel.start() as rank:
    learner = fb.attach(model, fb.DKP(), example=images[:8])
    # from here on, this process holds its own part of the net
    pipe = fb.parallel.pipeline(learner, images[:8], micro_batches=4)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(10):
        for x, y in zip(images.split(32), labels.split(32), strict=True):
            loss = pipe.backward(x, F.cross_entropy, y)
            optimizer.step()
            optimizer.zero_grad()
        # waits for the last process, so not in every step
        value = loss.item()
        if rank == 0:
            print(f"epoch {epoch}: loss {value:.3f}")

    accuracy = (pipe.evaluate(images).argmax(1) == labels).float().mean().item()
    whole = pipe.gather_state()  # the learner's state_dict, on rank 0
    if rank == 0:
        received = pipe.bytes_in_backward
        print(f"training accuracy {accuracy:.2f}, {received} bytes received for backward passes")
        assert accuracy > 0.8
        assert whole is not None
        assert whole["model.0.weight"].shape == (64, 64)
