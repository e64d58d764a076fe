"""Nets of timm and transforms of torchvision, by the names that the command line takes."""

import pytest
import torch
from client_nets import needed, torchvision_here

from feedbackward.errors import ConfigError
from feedbackward.experiment.data.dataset import Data, Images, Loader
from feedbackward.experiment.nets import build

torchvision_here()
timm = needed("timm")
pytestmark = pytest.mark.clients


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet18.a1_in1k", {"drop_path_rate": 0.1}),
        ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 2}),
    ],
)
def test_a_net_of_timm_is_made_for_the_data(name, options):
    torch.manual_seed(0)
    model = build(f"timm:{name}", (1, 32, 32), 5, options=options)
    torch.manual_seed(0)
    size = {"img_size": 32} if "vit" in name else {}
    same = timm.create_model(name, in_chans=1, num_classes=5, **size, **options)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(model.eval()(x), same.eval()(x))
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnt18", {}, "timm has no model 'resnt18': did you mean 'resnet18'"),
        ("resnet18", {"depht": 3}, "'timm:resnet18' cannot be made: .*'depht'"),
    ],
)
def test_a_net_of_timm_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build(f"timm:{name}", (3, 32, 32), 5, options=options)


@pytest.mark.parametrize("name", ["TrivialAugmentWide", "RandomHorizontalFlip", "RandomErasing"])
def test_a_resumed_run_sees_the_same_images(name):
    pixels = torch.randint(256, (30, 3, 16, 16), dtype=torch.uint8)
    images = Images(pixels, torch.arange(30))
    data = Data("noise", images, images, images, ["a", "b"], (0.0,) * 3, (1 / 255,) * 3)
    whole, resumed = (
        Loader(images, data, 10, augment=f"torchvision.transforms.v2:{name}", seed=3)
        for _ in range(2)
    )
    batches = list(whole.epoch(4))
    torch.rand(7)  # what the net draws in between changes nothing
    assert all(
        torch.equal(a[0], b[0]) for a, b in zip(batches[1:], resumed.epoch(4, 1), strict=True)
    )
    assert not torch.equal(batches[0][0], next(whole.epoch(5))[0])
