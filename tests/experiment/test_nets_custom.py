"""Nets: models of the user's own, what is refused, and where dropout goes."""

import sys
import types

import pytest
import torch
from test_nets import on_meta
from torch import nn

from feedbackward.errors import ConfigError
from feedbackward.experiment.nets import build, default_sites, published_sites, set_dropout


class Own(nn.Module):
    def __init__(self, in_shape, classes, norm="batch"):
        super().__init__()
        self.seen = (in_shape, classes, norm)


@pytest.fixture
def own(monkeypatch):
    module = types.ModuleType("own_nets")
    module.Own = Own
    module.fixed = lambda: nn.Linear(2, 3)
    module.only_classes = lambda classes=5: nn.Linear(2, classes)
    module.passes_on = lambda width=4, **options: nn.Linear(width, len(options) + 1)
    module.needs_more = lambda in_shape, depth: nn.Linear(in_shape[0], depth)
    module.text = lambda: "not a model"
    module.instance = nn.Linear(2, 3)
    module.number = 3
    monkeypatch.setitem(sys.modules, "own_nets", module)


@pytest.mark.usefixtures("own")
def test_own_model_gets_the_arguments_that_it_names():
    assert build("own_nets:Own", (3, 8, 8), 4).seen == ((3, 8, 8), 4, "batch")
    assert build("own_nets:Own", (3, 8, 8), 4, norm=False).seen == ((3, 8, 8), 4, False)
    assert build("own_nets:fixed", (3, 8, 8), 4).out_features == 3
    assert build("own_nets:only_classes", (3, 8, 8), 4).out_features == 4
    assert build("own_nets:passes_on", (3, 8, 8), 4).out_features == 1
    assert default_sites("own_nets:Own") == "layers"


@pytest.mark.usefixtures("own")
def test_options_are_further_keywords():
    model = build("own_nets:needs_more", (3, 8, 8), 4, options={"depth": 7})
    assert (model.in_features, model.out_features) == (3, 7)
    assert build("own_nets:passes_on", (3, 8, 8), 4, options={"a": 1, "b": 2}).out_features == 3


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("own_nets:fixed", {"depth": 7}, "cannot be called with depth"),
        ("own_nets:only_classes", {"classes": 7}, "names 'classes', which the data or `norm` decides"),
        ("vgg6", {"depth": 7}, "'vgg6' has no options, but model_options names depth"),
    ],
)  # fmt: skip
def test_options_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build(name, (3, 8, 8), 4, options=options)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "norm", "message"),
    [
        (
            "own_nets:needs_more",
            True,
            r"cannot be called with in_shape \(.*'depth'.*default values",
        ),
        ("own_nets:text", True, r"returned a str, expected a torch.nn.Module"),
        (
            "own_nets:instance",
            True,
            r"is a Linear, expected a function or class .* wrap it in a function",
        ),
        ("own_nets:number", True, r"is a int, expected a function"),
        ("own_nets:absent", True, r"could not be imported .*absent"),
        (
            "no_such_module_here:net",
            True,
            r"could not be imported .*no_such_module_here.*PYTHONPATH",
        ),
        (":net", True, r"could not be imported"),
        ("own_nets:fixed", False, r"norm=False cannot be applied .* no argument `norm`"),
    ],
)
def test_own_model_refused(name, norm, message):
    with pytest.raises(ConfigError, match=message):
        build(name, (3, 8, 8), 4, norm)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet50", "resnet56"),
        ("VGG16", "vgg16"),
        ("smallcnn", "small_cnn"),
        ("alex_net", "alexnet"),
    ],
)
def test_unknown_name_suggests_the_nearest(name, near):
    for call in (lambda: build(name, (3, 32, 32), 10), lambda: default_sites(name)):
        with pytest.raises(
            ConfigError,
            match=rf"unknown net '{name}'. Did you mean .*{near}.*\? Known nets: small_cnn",
        ):
            call()


def test_name_like_no_other_lists_all():
    with pytest.raises(
        ConfigError,
        match=r"unknown net 'zzz'\. Known nets: .*mlp.*; or package\.module:callable",
    ):
        build("zzz", (3, 32, 32), 10)


@pytest.mark.parametrize("name", ["vgg16", "any.module:net"])
def test_no_published_sites(name):
    with pytest.raises(
        ConfigError, match=r"no published sites \(only small_cnn, alexnet,.* have\)"
    ):
        published_sites(name)


@pytest.mark.parametrize(
    ("in_shape", "classes", "message"),
    [
        ((32, 32), 10, "in_shape"),
        ((3, 0, 32), 10, "in_shape"),
        ((3, 32, 32), 1, "classes .* at least 2"),
    ],
)
def test_impossible_shapes(in_shape, classes, message):
    with pytest.raises(ConfigError, match=message):
        build("vgg6", in_shape, classes)


def drops(model):
    return {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}


def test_dropout_goes_to_the_layers_that_there_are():
    model = on_meta("alexnet", (3, 32, 32))
    names = set(drops(model))
    set_dropout(model, 0.2)
    assert drops(model) == dict.fromkeys(names, 0.2)


@pytest.mark.parametrize(
    ("name", "places"), [("small_cnn", {"block3.drop"}), ("vgg6", {"block7.drop"}), ("mlp", {f"block{i}.drop" for i in (1, 2, 3)})]
)  # fmt: skip
def test_dropout_is_put_after_hidden_linear_layers_where_there_is_none(name, places):
    torch.manual_seed(0)
    model, x = build(name, (3, 32, 32), 10), torch.randn(4, 3, 32, 32)
    before = model.eval()(x)
    set_dropout(model, 0.5)
    assert drops(model) == dict.fromkeys(places, 0.5)
    assert torch.equal(model(x), before)
    assert not torch.equal(model.train()(x), model(x))


def test_a_net_without_a_place_for_dropout_is_refused():
    with pytest.raises(ConfigError, match="ResNet has no place for dropout"):
        set_dropout(on_meta("resnet20", (3, 32, 32)), 0.5)
