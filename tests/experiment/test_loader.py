"""The loader: order, augmentation, normalisation, and the same batches after a resume."""

import random

import numpy as np
import pytest
import torch

from feedbackward.errors import ConfigError
from feedbackward.experiment.data.dataset import Data, Images, Loader


def noise(count: int, side: int = 32, channels: int = 3) -> Images:
    """Images of noise without black, so that the border that a crop adds is seen; label = position."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(
        1, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8
    )
    return Images(pixels, torch.arange(count))


def data_of(images: Images, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255)) -> Data:
    """By default a normalisation that leaves the bytes as they are."""
    return Data("noise", images, images, images, ["a", "b"], mean, std)


def batches(loader: Loader, epoch: int = 0, start: int = 0) -> list:
    return list(loader.epoch(epoch, start))


def raw(inputs: torch.Tensor) -> torch.Tensor:
    """Inputs of the identity normalisation, as bytes again."""
    return inputs.round().to(torch.uint8)


def test_normalisation_is_pixel_over_255_standardised():
    images = noise(10, side=5)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ((inputs, labels),) = batches(Loader(images, data_of(images, mean, std), 10, shuffle=False))
    pixels = images.images.numpy().astype(np.float64) / 255
    expected = (pixels - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert inputs.dtype == torch.float32
    np.testing.assert_allclose(inputs.numpy(), expected, atol=2e-6)
    assert torch.equal(labels, torch.arange(10))


def test_every_image_once_in_an_order_of_its_own_each_epoch():
    images = noise(50, side=4)
    loader = Loader(images, data_of(images), 8, seed=3)
    orders = [torch.cat([labels for _, labels in batches(loader, epoch)]) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert not torch.equal(*orders)
    assert not torch.equal(
        orders[0], torch.cat([y for _, y in Loader(images, data_of(images), 8, seed=4).epoch(0)])
    )
    for inputs, labels in batches(loader):
        assert torch.equal(raw(inputs), images.images[labels])


class Draws:
    """Adds a number of each generator that a transform may draw from."""

    def __call__(self, image):
        numbers = torch.randint(9, ()), random.randrange(9), np.random.randint(9)
        return image + sum(int(n) for n in numbers)


def text(image):
    return "an image"


def halves(image):
    return image.float() / 2


@pytest.mark.parametrize("augment", ["none", "crop-flip", "test_loader:Draws"])
def test_resume_gives_bit_identical_batches(augment):
    images = noise(45, side=16)
    whole = batches(Loader(images, data_of(images), 8, augment=augment, seed=1), epoch=5)
    torch.manual_seed(99)  # the global generator plays no part
    for start in range(len(whole) + 1):
        resumed = batches(
            Loader(images, data_of(images), 8, augment=augment, seed=1), epoch=5, start=start
        )
        assert len(resumed) == len(whole) - start
        for (x, y), (x_resumed, y_resumed) in zip(whole[start:], resumed, strict=True):
            assert torch.equal(x, x_resumed)
            assert torch.equal(y, y_resumed)


def test_the_global_generator_is_left_alone():
    images = noise(20, side=8)
    before = torch.get_rng_state()
    batches(Loader(images, data_of(images), 8, augment="crop-flip"))
    assert torch.equal(before, torch.get_rng_state())


def offsets(cropped: np.ndarray, original: np.ndarray, pad: int) -> list[tuple[int, int, bool]]:
    """Every (down, right, mirrored) at which a naive crop of the padded original gives `cropped`."""
    channels, height, width = original.shape
    padded = np.zeros((channels, height + 2 * pad, width + 2 * pad), np.uint8)
    padded[:, pad : pad + height, pad : pad + width] = original
    found = []
    for down in range(2 * pad + 1):
        for right in range(2 * pad + 1):
            window = padded[:, down : down + height, right : right + width]
            found += [
                (down, right, flip)
                for flip in (False, True)
                if np.array_equal(cropped, window[:, :, :: 1 - 2 * flip])
            ]
    return found


@pytest.mark.parametrize(("side", "pad"), [(32, 4), (64, 8), (16, 2)])
def test_crops_and_flips_against_a_naive_search(side, pad):
    images = noise(200, side, channels=1)
    loader = Loader(images, data_of(images, (0.0,), (1 / 255,)), 100, augment="crop-flip")
    seen = []
    for inputs, labels in batches(loader):
        for image, original in zip(raw(inputs).numpy(), images.images[labels].numpy(), strict=True):
            matches = offsets(image, original, pad)
            assert len(matches) == 1
            seen += matches
    for axis in (
        0,
        1,
    ):  # every offset is met, both extremes too, and rows and columns are drawn apart
        assert {offset[axis] for offset in seen} == set(range(2 * pad + 1))
    assert any(down != right for down, right, _ in seen)
    assert (
        70 <= sum(mirrored for *_, mirrored in seen) <= 130
    )  # 100 +- 4 standard deviations of 7.1


def test_batches_epochs_and_seeds_are_augmented_differently():
    one = noise(1)
    images = Images(one.images.expand(40, -1, -1, -1), torch.arange(40))

    def inputs(seed: int, epoch: int) -> list:
        return [
            x
            for x, _ in batches(
                Loader(images, data_of(images), 20, augment="crop", seed=seed), epoch
            )
        ]

    (first, second), (next_epoch, _), (other_seed, _) = inputs(0, 0), inputs(0, 1), inputs(1, 0)
    for other in (second, next_epoch, other_seed):
        assert not torch.equal(first, other)


def test_flip_alone_and_crop_alone():
    images = noise(40)
    for augment, allowed in (("flip", {(4, 4, False), (4, 4, True)}), ("crop", None)):
        loader = Loader(images, data_of(images), 40, augment=augment)
        ((inputs, labels),) = batches(loader)
        found = [
            offsets(image, original, 4)[0]
            for image, original in zip(
                raw(inputs).numpy(), images.images[labels].numpy(), strict=True
            )
        ]
        assert allowed is None or set(found) == allowed
        assert augment == "flip" or not any(mirrored for *_, mirrored in found)


def test_colour_channels_move_together():
    gray = noise(30, channels=1)
    images = Images(gray.images.expand(-1, 3, -1, -1), gray.labels)
    ((inputs, _),) = batches(Loader(images, data_of(images), 30, augment="crop-flip"))
    assert torch.equal(inputs[:, 0], inputs[:, 1])
    assert torch.equal(inputs[:, 0], inputs[:, 2])


@pytest.mark.parametrize(
    ("count", "batch_size", "shuffle", "sizes"),
    [
        (10, 4, True, [4, 4, 2]),
        (8, 4, True, [4, 4]),
        (9, 4, True, [4, 4]),  # batch norm cannot train on a batch of one
        (9, 4, False, [4, 4, 1]),  # evaluation counts every image
        (3, 1, True, [1, 1, 1]),  # asked for
        (3, 100, True, [3]),
    ],
)
def test_last_batch(count, batch_size, shuffle, sizes):
    images = noise(count, side=4)
    loader = Loader(images, data_of(images), batch_size, shuffle=shuffle)
    assert [len(labels) for _, labels in batches(loader)] == sizes
    assert len(loader) == len(sizes)


def test_bad_options():
    images = noise(4, side=4)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        Loader(images, data_of(images), 0)
    with pytest.raises(ConfigError, match="Unknown augment 'mixup'"):
        Loader(images, data_of(images), 2, augment="mixup")


def test_a_transform_of_the_users_own_sees_each_image_and_leaves_the_generators():
    images = noise(12, side=4)
    augmented = Loader(images, data_of(images), 12, augment="test_loader:Draws", shuffle=False)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = random.random(), np.random.rand(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    ((inputs, _),) = batches(augmented)
    assert (random.random(), np.random.rand(), torch.rand(())) == wanted
    added = (raw(inputs) - images.images).flatten(1)
    assert (added == added[:, :1]).all()
    assert len(added[:, 0].unique()) > 3
    other = Loader(images, data_of(images), 12, augment="test_loader:Draws", shuffle=False, seed=1)
    assert not torch.equal(batches(other)[0][0], inputs)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (
            "test_loader:halves",
            r"returned torch.float32 \[3, 4, 4\] for an image uint8 \[3, 4, 4\]",
        ),
        ("test_loader:text", r"returned <class .str.>"),
        ("test_loader:Loader", "cannot be made without arguments"),
        ("test_loader:np", "is a module: expected a function of one image"),
        ("test_loader:absent", "augmentation 'test_loader:absent' could not be imported"),
        ("mirror", "Unknown augment 'mirror': choose one of none, .*torchvision.transforms.v2"),
    ],
)
def test_transforms_refused(augment, message):
    images = noise(4, side=4)
    with pytest.raises(ConfigError, match=message):
        batches(Loader(images, data_of(images), 4, augment=augment))
