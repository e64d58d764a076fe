"""The nets: shapes, sizes against closed forms and papers, the names of sites, and what is refused."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from feedbackward.errors import ConfigError
from feedbackward.experiment.nets import NETS, build, default_sites, published_sites

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64)]
IMAGE_NETS = [name for name, net in NETS.items() if net.task == "classification"]
CONV_NETS = [name for name in IMAGE_NETS if name != "mlp"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def on_meta(name, in_shape, classes=10, norm=True):
    """The net without storage: enough for shapes and counts, whatever its size."""
    with torch.device("meta"):
        return build(name, in_shape, classes, norm)


def count(model):
    return sum(p.numel() for p in model.parameters())


def output_shapes(model, in_shape, batch=2):
    """Shape, without the batch, of every module's output."""
    shapes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _m, _x, y, name=name: shapes.update({name: tuple(y.shape[1:])})
        )
    model(torch.empty(batch, *in_shape, device="meta"))
    return shapes


# ---- closed forms, written from the layers' widths alone


def plain(conv, linear, norm=True):
    """Parameters of a chain; conv: (c_in, c_out, kernel); each conv has scale and shift, or a bias."""
    convs = sum(a * b * k * k + (2 if norm else 1) * b for a, b, k in conv)
    return convs + sum(a * b + b for a, b in pairwise(linear))


def chain(channels, widths):
    """3x3 convolutions of these widths, one after the other."""
    return [(a, b, 3) for a, b in pairwise([channels, *widths])]


VGG_WIDTHS = {
    "vgg6": [32, 32, 64, 64, 128, 128],
    "vgg11": [64, 128, 256, 256, 512, 512, 512, 512],
    "vgg13": [64, 64, 128, 128, 256, 256, 512, 512, 512, 512],
    "vgg16": [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512],
}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("in_shape", "pooled"), [((1, 28, 28), 12), ((3, 32, 32), 14), ((3, 64, 64), 30)]
)
def test_size_of_small_cnn(in_shape, pooled, norm):
    expected = plain(chain(in_shape[0], [32, 32]), [32 * pooled * pooled, 128, 10], norm)
    assert count(on_meta("small_cnn", in_shape, 10, norm)) == expected


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("in_shape", "stem", "features", "units"),
    [
        ((1, 28, 28), 5, 256 * 2 * 2, 1024),
        ((3, 32, 32), 5, 256 * 3 * 3, 1024),
        ((3, 64, 64), 7, 256 * 3 * 3, 2048),
        ((3, 224, 224), 11, 256 * 6 * 6, 4096),
    ],
)
def test_size_of_alexnet(in_shape, stem, features, units, norm):
    conv = [(in_shape[0], 64, stem), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3)]
    expected = plain(conv, [features, units, units, 200], norm)
    assert count(on_meta("alexnet", in_shape, 200, norm)) == expected


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", VGG_WIDTHS)
@pytest.mark.parametrize("in_shape", SHAPES)
def test_size_of_vgg(name, in_shape, norm):
    pools, fully = (3, [128]) if name == "vgg6" else (5, [512, 512])
    side = in_shape[1]
    for _ in range(pools):
        side = -(-side // 2)
    widths = VGG_WIDTHS[name]
    expected = plain(chain(in_shape[0], widths), [widths[-1] * side * side, *fully, 100], norm)
    assert count(on_meta(name, in_shape, 100, norm)) == expected


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("name", "n"), [("resnet20", 3), ("resnet56", 9), ("resnet110", 18)])
def test_size_of_cifar_resnet(name, n, norm):
    widths = [16] * (2 * n + 1) + [32] * (2 * n) + [64] * (2 * n)
    assert count(on_meta(name, (3, 32, 32), 10, norm)) == plain(chain(3, widths), [64, 10], norm)


@pytest.mark.parametrize(
    ("in_shape", "stem"), [((1, 28, 28), 3), ((3, 64, 64), 3), ((3, 224, 224), 7)]
)
def test_size_of_resnet18(in_shape, stem):
    widths = [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4
    conv = [(in_shape[0], 64, stem), *chain(64, widths), (64, 128, 1), (128, 256, 1), (256, 512, 1)]
    assert count(on_meta("resnet18", in_shape)) == plain(conv, [512, 10])


def test_size_of_mlp():
    assert count(on_meta("mlp", (3, 32, 32))) == plain([], [3072, 1000, 1000, 1000, 10])


@pytest.mark.parametrize(
    ("name", "in_shape", "classes", "millions", "digits"),
    [
        ("small_cnn", (3, 32, 32), 10, 0.81, 2),  # dkp-gist
        ("resnet20", (3, 32, 32), 10, 0.27, 2),  # He et al. 2016, table 6
        ("resnet56", (3, 32, 32), 10, 0.85, 2),
        ("resnet110", (3, 32, 32), 10, 1.7, 1),
        ("resnet18", (3, 32, 32), 10, 11.17, 2),  # the usual CIFAR form
        ("resnet18", (3, 224, 224), 1000, 11.689512, 6),  # torchvision
    ],
)
def test_sizes_known_from_the_literature(name, in_shape, classes, millions, digits):
    assert round(count(on_meta(name, in_shape, classes)) / 1e6, digits) == millions


def test_alexnet_differs_from_torchvision_by_the_norm_only():
    biases = 64 + 192 + 384 + 256 + 256
    assert count(on_meta("alexnet", (3, 224, 224), 1000)) == 61_100_840 - biases + 2 * biases


def test_vgg16_has_the_published_convolutions_and_16_layers():
    model = on_meta("vgg16", (3, 32, 32))
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.weight.numel() for m in convs) == 14_710_464
    assert len(convs) + sum(isinstance(m, nn.Linear) for m in model.modules()) == 16


# ---- shapes and names


@pytest.mark.parametrize("name", IMAGE_NETS)
@pytest.mark.parametrize("in_shape", [*SHAPES, (3, 33, 47), (3, 224, 224)])
def test_output_shape(name, in_shape):
    model = on_meta(name, in_shape, 7)
    assert model(torch.empty(2, *in_shape, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", IMAGE_NETS)
def test_smallest_image(name):
    side = NETS[name].min_side
    model = on_meta(name, (1, side, side), 3)
    assert model(torch.empty(2, 1, side, side, device="meta")).shape == (2, 3)
    if side > 1:
        with pytest.raises(
            ConfigError, match=rf"at least {side} x {side} px, got {side - 1} x {side}"
        ):
            build(name, (1, side - 1, side), 3)


@pytest.mark.parametrize(
    ("name", "in_shape", "expected"),
    [
        ("small_cnn", (3, 32, 32), [(32, 30, 30), (32, 28, 28), (128,)]),
        (
            "alexnet",
            (3, 224, 224),
            [
                (64, 27, 27),
                (192, 13, 13),
                (384, 13, 13),
                (256, 13, 13),
                (256 * 6 * 6,),
                (4096,),
                (4096,),
            ],
        ),
        (
            "alexnet",
            (3, 32, 32),
            [(64, 15, 15), (192, 7, 7), (384, 7, 7), (256, 7, 7), (2304,), (1024,), (1024,)],
        ),
        (
            "alexnet",
            (3, 64, 64),
            [(64, 15, 15), (192, 7, 7), (384, 7, 7), (256, 7, 7), (2304,), (2048,), (2048,)],
        ),
    ],
)
def test_published_sites_have_the_published_shapes(name, in_shape, expected):
    shapes = output_shapes(on_meta(name, in_shape), in_shape)
    assert [shapes[site] for site in published_sites(name)] == expected
    assert published_sites(name) == NETS[name].published_sites


def test_residual_blocks_have_names_and_the_paper_s_maps():
    shapes = output_shapes(on_meta("resnet20", (3, 32, 32)), (3, 32, 32))
    blocks = [shapes[f"stages.s{stage}b{block}"] for stage in (1, 2, 3) for block in (1, 2, 3)]
    assert blocks == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    shapes = output_shapes(on_meta("resnet18", (3, 224, 224)), (3, 224, 224))
    assert [shapes[f"stages.s{stage}b2"] for stage in (1, 2, 3, 4)] == [
        (64, 56, 56),
        (128, 28, 28),
        (256, 14, 14),
        (512, 7, 7),
    ]


def test_vgg16_feedback_to_all_layers_has_the_known_size():
    """Activity entering each layer after the first, times 200 classes: the 36 M values known for this net."""
    model = on_meta("vgg16", (3, 32, 32), 200)
    shapes = output_shapes(model, (3, 32, 32))
    units = sum(torch.Size(shapes[f"block{i}"]).numel() for i in range(1, 16))
    assert units == 64 * (1024 + 256) + 128 * (256 + 64) + 256 * (64 * 2 + 16) + 512 * (
        16 * 2 + 4 + 4 * 2 + 1 + 2
    )
    assert units * 200 // 10**6 == 36


@pytest.mark.parametrize("name", IMAGE_NETS)
def test_default_sites_are_all_layers(name):
    assert default_sites(name) == "layers"
    assert NETS[name].about


# ---- how the modules are built


@pytest.mark.parametrize("name", IMAGE_NETS)
def test_every_module_runs_once_in_its_own_place(name):
    model = on_meta(name, (3, 32, 32))
    calls = []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda _m, x, y, path=path: calls.append((path, x[0] is y)))
    model(torch.empty(2, 3, 32, 32, device="meta"))
    names = [path for path, _ in calls]
    assert sorted(names) == sorted(path for path, _ in model.named_modules())
    assert not any(same for _, same in calls), "a module returned its own input"
    assert not any(getattr(m, "inplace", False) for m in model.modules())


@pytest.mark.parametrize("name", CONV_NETS)
def test_norm_and_bias_exclude_each_other(name):
    with_norm, without = on_meta(name, (3, 32, 32)), on_meta(name, (3, 32, 32), norm=False)
    convs = [m for m in with_norm.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.bias is None for m in convs)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in with_norm.modules()) == len(convs)
    assert all(m.bias is not None for m in without.modules() if isinstance(m, nn.Conv2d))
    assert not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in without.modules())


@pytest.mark.parametrize("name", [n for n in IMAGE_NETS if n != "resnet110"])
@pytest.mark.parametrize("norm", [True, False])
def test_gradients_reach_every_parameter(name, norm):
    model = build(name, (3, 32, 32), 10, norm)
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4))
    loss.backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_he_initialisation(name):
    model = build(name, (3, 32, 32), 10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)


def test_deep_residual_net_without_norm_starts_at_a_sane_scale():
    """27 blocks that each multiply the variance by about 1 + 1/27 give e, not 2**27."""
    model = build("resnet56", (3, 32, 32), 10, norm=False)
    with torch.no_grad():
        h = model.stem(torch.randn(8, 3, 32, 32))
        ratio = model.stages(h).pow(2).mean() / h.pow(2).mean()
    assert 0.1 < ratio < 10
