"""timm's nets: gradients against signals set by hand, at their own blocks."""

from __future__ import annotations

import pytest
import torch
from client_nets import needed, torchvision_here
from torch import nn
from torch.nn import functional as F

import feedbackward as fb

pytestmark = pytest.mark.clients
torchvision_here()
timm = needed("timm")

Y = torch.arange(3)
# a size that the net takes, and options that make it small
NETS = {
    "resnet18": (32, {}),
    "resnet50": (32, {}),
    "vit_tiny_patch16_224": (32, {"img_size": 32}),
    "convnext_atto": (32, {}),
    "mobilenetv3_small_050": (32, {}),
    "efficientnet_b0": (32, {}),
    "mixer_s32_224": (224, {}),
    "swin_tiny_patch4_window7_224": (224, {}),
    "regnety_002": (32, {}),
    "densenet121": (32, {}),
    "inception_v3": (96, {}),
    "poolformer_s12": (32, {}),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    size, options = NETS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).double()
    for key, p in model.named_parameters():
        # layer scales and last norms of a branch begin at zero, which would hide it
        if not p.detach().abs().max():
            nn.init.normal_(p.data, std=0.1) if "bias" not in key else None
    return model, torch.randn(3, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize("name", NETS)
def test_feedback_of_zero_leaves_the_head_alone_and_exact_is_backprop(name: str) -> None:
    model, x = made(name)
    loss = lambda out: F.cross_entropy(out, Y)  # noqa: E731
    model.eval()
    params = dict(model.named_parameters())
    truth = torch.autograd.grad(loss(model(x)), list(params.values()), allow_unused=True)
    model.train()
    learner = fb.attach(model, fb.DFA(), example=x, sites="blocks")
    assert learner.sites
    model.eval()
    with learner.exact():
        exact = torch.autograd.grad(loss(learner(x)), list(params.values()), allow_unused=True)
    for a, b in zip(exact, truth, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for B in learner.feedback.buffers():
        B.zero_()
    cut = torch.autograd.grad(loss(learner(x)), list(params.values()), allow_unused=True)
    above = set(learner.plan.head.parameters)
    for (key, _), gradient, true in zip(params.items(), cut, truth, strict=True):
        if key in above:
            torch.testing.assert_close(gradient, true, rtol=1e-9, atol=1e-12)
        else:
            assert gradient is None or not gradient.any(), key
