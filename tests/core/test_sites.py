"""Where a model is cut: plans worked out by hand, and passes that must be refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from wired import Net, X, two_layers
from zoo_blocks import BasicBlock

import feedbackward as fb


def plan_of(learner: fb.Learner) -> dict[str, set[str]]:
    plan = learner.plan
    return {segment.site: set(segment.parameters) for segment in (*plan.segments, plan.head)}


def names(learner: fb.Learner) -> list[str]:
    return [site.name for site in learner.sites]


# --- "layers" ----------------------------------------------------------------------------------------------------


def test_one_site_feeds_conv1_and_the_downsample_path() -> None:
    """The block's input enters two convolutions and the skip path; each is cut off from the layers before it."""
    stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(
        stem, BasicBlock(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    learner = fb.attach(model, fb.DFA(), example=torch.randn(5, 2, 8, 8))
    later = {"1.conv2.weight", "1.bn2.weight", "1.bn2.bias"}
    down = {"1.downsample.0.weight", "1.downsample.1.weight", "1.downsample.1.bias"}
    assert plan_of(learner) == {
        "0.2": {"0.0.weight", "0.1.weight", "0.1.bias"},
        "1.conv2.input": {"1.conv1.weight", "1.bn1.weight", "1.bn1.bias"},
        "3": later | down,
        "head": {"4.weight", "4.bias"},
    }


def test_q_k_v_share_a_site() -> None:
    case = zoo.case("attention")
    model, example = zoo.build(case)
    learner = fb.attach(model, fb.DFA(), example=example)
    assert plan_of(learner)["norm"] == {"up.weight", "up.bias", "norm.weight", "norm.bias"}
    mixed = {f"{m}.{p}" for m in "qkv" for p in ("weight", "bias")}
    assert mixed < plan_of(learner)["mixed"]
    assert [site.shape for site in learner.sites] == [(4, 8), (4, 8), (8,)]


def test_layers_that_share_a_functional_activation_share_a_site() -> None:
    model = two_layers(lambda m, x: m.out(m.b(h := m.a(x).relu()) + m.c(h)), c=nn.Linear(8, 8))
    learner = fb.attach(model, fb.DFA(), example=X)
    assert plan_of(learner) == {
        "b.input": {"a.weight", "a.bias"},
        "out.input": {"b.weight", "b.bias", "c.weight", "c.bias"},
        "head": {"out.weight", "out.bias"},
    }


def test_skip_path_of_a_functional_activation_stays_whole_and_is_listed() -> None:
    """No module made the tensor that enters `b`, so only `b` sees the cut; `a` hears two sites, and the plan says so."""
    learner = fb.attach(
        two_layers(lambda m, x: m.out((h := m.a(x).relu()) + m.b(h))), fb.DFA(), example=X
    )
    assert names(learner) == ["b.input", "out.input"]
    assert learner.plan.shared == dict.fromkeys(("a.weight", "a.bias"), ("b.input", "out.input"))
    assert "in several segments (gradients add up): a.weight in b.input, out.input" in str(learner)


def test_skip_path_of_an_activation_module_is_cut_too() -> None:
    model = two_layers(lambda m, x: m.out((h := m.act(m.a(x))) + m.b(h)), act=nn.ReLU())
    learner = fb.attach(model, fb.DFA(), example=X)
    assert plan_of(learner) == {
        "act": {"a.weight", "a.bias"},
        "out.input": {"b.weight", "b.bias"},
        "head": {"out.weight", "out.bias"},
    }


def test_layers_outside_the_way_to_the_source_are_no_sites() -> None:
    def wiring(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.a(x).relu()
        return m.out(h), m.b(h.detach())

    learner = fb.attach(two_layers(wiring), fb.DFA(), example=X, output=lambda o: o[0])
    assert names(learner) == ["out.input"]
    assert plan_of(learner)["head"] == {"out.weight", "out.bias", "b.weight", "b.bias"}


def test_error_at_keeps_the_layers_above_on_their_true_gradient() -> None:
    model, example = zoo.build(zoo.case("mlp"))
    learner = fb.attach(model, fb.DFA(), example=example, error_at="2")
    assert (learner.source.name, names(learner)) == ("2", ["1"])
    assert plan_of(learner)["head"] == {f"{i}.{p}" for i in (2, 3, 6) for p in ("weight", "bias")}


def test_frozen_layers_get_no_signal_and_nothing_else_changes() -> None:
    model, example = zoo.build(zoo.case("plain"))
    for p in model.conv1.parameters():
        p.requires_grad_(False)
    for p in model.bn.parameters():
        p.requires_grad_(False)
    learner = fb.attach(model, fb.DKP.published(), example=example)
    learner(example).sum().backward()
    assert learner.plan.segments[0].parameters == ()
    assert learner.plan.unreached == ()
    assert model.conv1.weight.grad is None
    assert not model.conv1.weight.requires_grad
    grads = {edge.key: learner.feedback_of(edge).grad for edge in learner.graph.edges}
    assert [key for key, grad in grads.items() if grad is None] == ["conv2/input"]


def test_parameters_that_nothing_reaches_are_reported() -> None:
    model = two_layers(lambda m, x: m.out(m.a(x).relu()))
    with pytest.warns(UserWarning, match=r"no segment trains these parameters: b\.weight, b\.bias"):
        learner = fb.attach(model, fb.DFA(), example=X)
    assert learner.plan.unreached == ("b.weight", "b.bias")
    assert "not trained, no segment reaches it: b.weight" in str(learner)


# --- every second, stages ---------------------------------------------------------------------------------------------


def image_net() -> nn.Sequential:
    """Sites: 2 (12 px), 4 (after the pool, 6 px), 6, 8 (flat), 10; sizes after the layers are 12, 12, 6, 6."""
    convs = [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.MaxPool2d(2),
    ]
    top = [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten()]
    return nn.Sequential(*convs, *top, nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ("layers", ["2", "4", "6", "8", "10"]),
        ("every-1", ["2", "4", "6", "8", "10"]),
        ("every-2", ["2", "6", "10"]),
        ("every-3", ["4", "10"]),
        ("every-9", ["10"]),
        ("stages", ["4", "8", "10"]),
    ],
)
def test_fewer_sites_are_counted_from_the_last_one_or_end_a_stage(
    sites: str, expected: list[str]
) -> None:
    learner = fb.attach(
        image_net(), fb.DKP.published(), example=torch.randn(3, 1, 12, 12), sites=sites
    )
    assert names(learner) == expected


def test_every_needs_a_number_and_a_chain_refuses_it() -> None:
    with pytest.raises(fb.errors.SiteError, match="must end in a number"):
        fb.attach(
            image_net(), fb.DKP.published(), example=torch.randn(3, 1, 12, 12), sites="every-second"
        )
    with pytest.raises(fb.errors.AttachError, match="a chain runs from layer to layer"):
        fb.attach(image_net(), fb.FA(), example=torch.randn(3, 1, 12, 12), sites="every-2")


# --- names, predicates, blocks ------------------------------------------------------------------------------------


def test_a_container_and_its_last_part_are_one_site() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3))
    for sites in (["0", "0.1"], ["0.1", "0"], lambda name, module: name in ("0", "0.1")):
        assert names(fb.attach(copy.deepcopy(model), fb.DFA(), example=X, sites=sites)) == ["0.1"]


def test_a_named_module_is_cut_for_every_user_of_its_output() -> None:
    model = two_layers(lambda m, x: m.out((h := m.a(x)) + m.b(h.relu())))
    learner = fb.attach(model, fb.DFA(), example=X, sites="a")
    assert plan_of(learner) == {
        "a": {"a.weight", "a.bias"},
        "head": {"b.weight", "b.bias", "out.weight", "out.bias"},
    }


def test_of_several_returned_tensors_the_one_that_leads_on_is_cut() -> None:
    """An LSTM returns its outputs and its last states; here the net goes on from the states, batch in front."""

    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out, (h, _) = self.lstm(x)
            return out, h[0]

    model = Net(lambda m, x: m.fc(m.states(x)[1]), states=States(), fc=nn.Linear(8, 3))
    x = torch.randn(5, 4, 6)
    learner = fb.attach(
        model, fb.DKP.published(operator=fb.Dense("zeros")), example=x, sites=["states"]
    )
    assert names(learner) == ["states[1]"]
    learner(x).square().sum().backward()
    assert not model.states.lstm.weight_ih_l0.grad.any()
    assert model.fc.weight.grad.any()


def test_a_tensor_returned_twice_is_cut_in_both_places() -> None:
    pair = Net(lambda m, x: (h := m.fc(x), h), fc=nn.Linear(6, 8))
    model = Net(lambda m, x: m.out(sum(m.pair(x))), pair=pair, out=nn.Linear(8, 3))
    learner = fb.attach(
        model, fb.DKP.published(operator=fb.Dense("zeros")), example=X, sites=["pair"]
    )
    learner(X).square().sum().backward()
    assert not pair.fc.weight.grad.any()


def test_several_tensors_that_lead_on_are_refused() -> None:
    pair = Net(lambda m, x: (m.fc(x), m.fc2(x)), fc=nn.Linear(6, 8), fc2=nn.Linear(6, 8))
    model = Net(lambda m, x: m.out(sum(m.pair(x))), pair=pair, out=nn.Linear(8, 3))
    with pytest.raises(
        fb.SiteError, match=r"'pair' returns 2 tensors .* Name a module that returns one"
    ):
        fb.attach(model, fb.DFA(), example=X, sites=["pair"])


BLOCKS = {
    "resnet": ("layer1.0", "layer1.1", "layer2.0", "layer2.1"),
    "resnet_preactivation": ("1", "2"),
    "densenet": ("1", "2"),
    "mobilenet": ("0.0", "0.1", "0.2", "0.3"),
    "vit": ("blocks.0", "blocks.1"),
    "gpt_blocks": ("h.0", "h.1"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    """Every parameter lies in one segment, whatever overlaps at layer level; only tied weights lie in two."""
    model, example = zoo.build(zoo.case(name))
    learner = fb.attach(model, fb.DFA(), example=example, sites="blocks")
    assert tuple(names(learner)) == BLOCKS[name]
    assert set(learner.plan.shared) == ({"wte.weight"} if name == "gpt_blocks" else set())


def test_blocks_without_a_list_are_found_by_their_skip_path() -> None:
    model = Net(
        lambda m, x: m.out(m.two(m.one(m.a(x)))),
        a=nn.Linear(6, 8),
        one=Net(lambda m, x: x + m.fc(x), fc=nn.Linear(8, 8)),
        two=Net(lambda m, x: torch.cat([x, m.fc(x)], 1), fc=nn.Linear(8, 8)),
        out=nn.Linear(16, 3),
    )
    assert names(fb.attach(model, fb.DFA(), example=X, sites="blocks")) == ["one", "two"]


def test_a_container_of_blocks_is_no_block() -> None:
    """An encoder that normalises what its last block returns has a path without layers from end to end."""

    def encode(m: Net, x: Tensor) -> Tensor:
        for block in m.blocks:
            x = block(x)
        return m.norm(x)

    blocks = nn.ModuleList([Net(lambda m, x: x + m.fc(x), fc=nn.Linear(8, 8)) for _ in range(2)])
    encoder = Net(encode, blocks=blocks, norm=nn.LayerNorm(8))
    model = Net(
        lambda m, x: m.out(m.encoder(m.a(x))),
        a=nn.Linear(6, 8),
        encoder=encoder,
        out=nn.Linear(8, 3),
    )
    learner = fb.attach(model, fb.DFA(), example=X, sites="blocks")
    assert names(learner) == ["encoder.blocks.0", "encoder.blocks.1"]


def test_a_net_without_blocks_names_candidates() -> None:
    features = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    model = Net(lambda m, x: m.out(m.features(x)), features=features, out=nn.Linear(8, 3))
    with pytest.raises(
        fb.AttachError, match=r"no residual or repeated block in Net; .*named instead: features"
    ):
        fb.attach(model, fb.DFA(), example=X, sites="blocks")


# --- in place -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("functional", [False, True])
def test_in_place_activation_after_a_cut_is_refused(functional: bool) -> None:
    act = (lambda m, h: F.relu_(h)) if functional else (lambda m, h: m.act(h))
    model = two_layers(lambda m, x: m.out(act(m, m.b(m.a(x).relu()))), act=nn.ReLU(inplace=True))
    with pytest.raises(
        fb.SiteError, match=r"'b' was changed in place after the cut .*inplace=False"
    ):
        fb.attach(model, fb.DKP.published(), example=X, sites=["b"])


def test_in_place_activation_that_comes_later_is_refused_in_that_pass() -> None:
    model = two_layers(lambda m, x: m.out(m.act(m.b(m.a(x).relu()))), act=nn.ReLU())
    learner = fb.attach(model, fb.DFA(), example=X, sites=["b"])
    model.act.inplace = True
    with pytest.raises(fb.SiteError, match=r"'b' was changed in place"):
        learner(X)


@pytest.mark.parametrize("name", ["in_place", "resnet", "mobilenet"])
def test_in_place_activations_give_the_gradients_of_ordinary_ones(name: str) -> None:
    grads = []
    for inplace in (True, False):
        model, example = zoo.build(zoo.case(name))
        for module in model.modules():
            if hasattr(module, "inplace") and not isinstance(module, nn.Dropout):
                module.inplace = inplace
        learner = fb.attach(model, fb.DKP.published(), example=example)
        torch.manual_seed(3)
        learner(example).square().sum().backward()
        grads.append([p.grad for p in learner.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("act", ["module", "functional"])
def test_in_place_activation_on_the_source(act: str) -> None:
    """The error is that of the pre-activation, although its tensor is overwritten afterwards."""
    grads = []
    for inplace in (True, False):
        torch.manual_seed(0)
        relu = nn.ReLU(inplace) if act == "module" else nn.Identity()
        model = two_layers(lambda m, x: m.out(m.act(m.b(m.a(x).tanh()))), act=relu)
        if act == "functional":
            model.wiring = lambda m, x, i=inplace: m.out(F.relu(m.b(m.a(x).tanh()), inplace=i))
        learner = fb.attach(model, fb.DKP.published(), example=X, error_at="b")
        learner(X).square().sum().backward()
        grads.append([p.grad for p in learner.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_output_changed_in_place_by_the_caller() -> None:
    grads = []
    for inplace in (True, False):
        model, example = zoo.build(zoo.case("tokens"))
        out = fb.attach(model, fb.DKP.published(), example=example)(example)
        out = out.mul_(2) if inplace else out * 2
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- what a flatten made of a map ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("between", "known"),
    [
        (lambda h: h.flatten(1), True),
        (lambda h: F.dropout(h.reshape(len(h), -1), 0.5), True),
        (lambda h: h.permute(0, 2, 3, 1).flatten(1), False),
        (lambda h: h.mean((2, 3)).repeat(1, 36), False),
        (lambda h: F.adaptive_avg_pool2d(h.repeat(1, 36, 1, 1), 1).flatten(1), False),
    ],
    ids=["flatten", "reshape-dropout", "permuted", "averaged", "one-place"],
)
def test_a_site_knows_the_map_that_it_was(
    between: Callable[[Tensor], Tensor], known: bool, layout: torch.memory_format
) -> None:
    model = Net(
        lambda m, x: m.out(between(m.conv(x).relu())),
        conv=nn.Conv2d(2, 4, 3),
        out=nn.Linear(144, 3),
    )
    x = torch.randn(5, 2, 8, 8).to(memory_format=layout)
    learner = fb.attach(model.to(memory_format=layout), fb.DFA(), example=x)
    (site,) = learner.sites
    assert site.shape == (144,)
    assert site.unflattened == ((4, 6, 6) if known else ())
