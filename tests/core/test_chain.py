"""Chains (FA, Kolen-Pollack): with B = W they are backprop; KP's difference contracts; what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import feedbackward as fb

LAYERS_2D = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "rectangular": lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(0, 2), bias=False),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=1),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "same, even kernel": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "reflect": lambda: nn.Conv2d(4, 6, 5, padding=2, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="replicate", stride=2),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2),
}


def make(layer: nn.Module, dim: int) -> nn.Module:
    """A net whose second layer is the one in question, between a layer below and a norm and a head above."""
    conv, norm = {
        1: (nn.Conv1d, nn.BatchNorm1d),
        2: (nn.Conv2d, nn.BatchNorm2d),
        3: (nn.Conv3d, nn.BatchNorm3d),
    }[dim]
    width = layer.out_channels
    return nn.Sequential(
        conv(2, 4, 3, padding=1),
        nn.Tanh(),
        layer,
        norm(width),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(5),
    ).double()


def check_tied(model: nn.Module, x: torch.Tensor, rule: fb.Rule) -> None:
    model(x)  # makes lazy layers
    y = torch.arange(len(x)) % 5
    F.cross_entropy(
        model(x).flatten(0, -2), y.repeat_interleave(model(x).flatten(0, -2).shape[0] // len(x))
    ).backward()
    true = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    learner = fb.attach(model, rule, example=x)
    target = y.repeat_interleave(model(x).flatten(0, -2).shape[0] // len(x))
    with torch.no_grad():
        for edge in learner.graph.edges:
            learner.feedback_of(edge).copy_(model.get_parameter(edge.site.weight))
    F.cross_entropy(learner(x).flatten(0, -2), target).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, true[name], rtol=1e-12, atol=1e-14, msg=name)
    if rule.learned:
        for edge in learner.graph.edges:
            B, W = learner.feedback_of(edge), model.get_parameter(edge.site.weight)
            assert torch.equal(B.grad, W.grad)
            assert B.grad.data_ptr() != W.grad.data_ptr()


@pytest.mark.parametrize("rule", [fb.FA(), fb.KolenPollack()], ids=["fa", "kp"])
@pytest.mark.parametrize("name", LAYERS_2D)
def test_tied_chain_is_backprop_2d(name: str, rule: fb.Rule) -> None:
    torch.manual_seed(0)
    check_tied(make(LAYERS_2D[name](), 2), torch.randn(5, 2, 9, 8, dtype=torch.float64), rule)


@pytest.mark.parametrize("dim", [1, 3])
def test_tied_chain_is_backprop_in_other_dimensions(dim: int) -> None:
    torch.manual_seed(0)
    conv, transposed = {1: (nn.Conv1d, nn.ConvTranspose1d), 3: (nn.Conv3d, nn.ConvTranspose3d)}[dim]
    x = torch.randn(4, 2, *[7, 6, 5][:dim], dtype=torch.float64)
    check_tied(make(conv(4, 6, 3, padding=1, padding_mode="circular"), dim), x, fb.FA())
    check_tied(make(conv(4, 6, 3, stride=2, groups=2, padding=1), dim), x, fb.FA())
    check_tied(make(transposed(4, 6, 3, stride=2), dim), x, fb.FA())


def test_tied_chain_is_backprop_on_tokens_and_skips() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(6, 8)
            self.norm = nn.LayerNorm(8)
            self.up, self.down, self.skip = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.embed(x)
            h = h + self.down(F.gelu(self.up(self.norm(h)))) + self.skip(h)
            return self.head(h)

    torch.manual_seed(0)
    for rule in (fb.FA(), fb.KolenPollack()):
        check_tied(Mixer().double(), torch.randn(4, 3, 6, dtype=torch.float64), rule)


def small() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8),
        nn.ReLU(), nn.Linear(8, 3),
    ).double()  # fmt: skip
    return model, torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 3


def test_fa_signal_uses_b_in_place_of_w() -> None:
    """The last layer by hand: the signal at its input is e B, and below it flows on through the layers' own backward."""
    model, x, y = small()
    learner = fb.attach(model, fb.FA(), example=x)
    h = model[:7](x)
    e = (F.softmax(model[7](h), 1) - F.one_hot(y, 3)) / len(x)
    signal = e @ learner.feedback_of(learner.graph.edges[-1])
    flat = model[:5](x).detach()
    expected = ((signal * (h > 0)).T @ flat).detach()
    F.cross_entropy(learner(x), y).backward()
    torch.testing.assert_close(model[5].weight.grad, expected, rtol=1e-12, atol=1e-14)


def test_kolen_pollack_contracts() -> None:
    model, x, y = small()
    learner = fb.attach(model, fb.KolenPollack(), example=x)
    lr, decay, steps = 0.1, 0.05, 40
    optimizer = torch.optim.SGD(learner.parameters(), lr=lr, weight_decay=decay)
    pairs = [
        (model.get_parameter(e.site.weight), learner.feedback_of(e)) for e in learner.graph.edges
    ]
    start = [(W - B).detach().clone() for W, B in pairs]
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(learner(x), y).backward()
        optimizer.step()
    for (W, B), difference in zip(pairs, start, strict=True):
        torch.testing.assert_close(
            W - B, difference * (1 - lr * decay) ** steps, rtol=1e-10, atol=1e-12
        )


def test_kolen_pollack_computes_no_second_product() -> None:
    model, x, y = small()
    flops = {}
    for rule in (fb.FA(), fb.KolenPollack()):
        learner = fb.attach(model, rule, example=x)
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(learner(x), y).backward()
        flops[rule.name] = counter.get_total_flops()
        learner.detach()
    assert flops["fa"] == flops["kp"]


@pytest.mark.single
@pytest.mark.parametrize("rule", [fb.FA(), fb.KolenPollack()], ids=["fa", "kp"])
def test_accumulation_and_compile(rule: fb.Rule) -> None:
    model, x, y = small()
    learner = fb.attach(model, rule, example=x)
    F.cross_entropy(learner(x), y).backward()
    whole = {name: p.grad.clone() for name, p in learner.named_parameters()}
    learner.zero_grad()
    for part in (slice(0, 2), slice(2, 6)):
        F.cross_entropy(learner(x[part]), y[part], reduction="sum").div(len(x)).backward()
    for name, p in learner.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-12, atol=1e-14)
    learner.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(learner, backend="aot_eager", fullgraph=True)
    F.cross_entropy(compiled(x), y).backward()
    for name, p in learner.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-12, atol=1e-14)


def test_chosen_layers_only() -> None:
    """Layers that are left out pass the error through their own weights: with all left out but one, tied, it is BP."""
    model, x, _ = small()
    learner = fb.attach(model, fb.FA(), example=x, sites=["5"])
    assert [edge.site.weight for edge in learner.graph.edges] == ["5.weight"]
    with pytest.raises(fb.SiteError, match="'0' is not a layer that a chain can feed"):
        fb.attach(model, fb.FA(), example=x, sites=["0"])
    with pytest.raises(fb.AttachError, match="layer to layer"):
        fb.attach(model, fb.FA(), example=x, sites="blocks")


def test_refuses_what_it_cannot_see() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), block, nn.Linear(8, 3))
    x = torch.randn(3, 5, 4)
    with pytest.raises(
        fb.AttachError, match=r"'1.self_attn': nn.MultiheadAttention applies .* direct feedback"
    ):
        fb.attach(model, fb.FA(), example=x)
    fb.attach(model, fb.DKP.published(), example=x, sites="blocks")  # the advice holds

    shared = nn.Linear(4, 4)
    with pytest.raises(fb.AttachError, match=r"layer '1.0' is called 2 times"):
        fb.attach(
            nn.Sequential(nn.Linear(4, 4), nn.Sequential(shared, nn.ReLU()), shared),
            fb.FA(),
            example=x,
        )


def test_zero_feedback_is_refused_where_it_is_fixed() -> None:
    with pytest.raises(fb.AttachError, match="zero feedback"):
        fb.FA(init="zeros")
    fb.KolenPollack(init="zeros")


class Wired(nn.Module):
    """A stem, a middle and a head, put together by `how(self, x)`."""

    def __init__(self, how, **extra: nn.Module) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.how = how
        for name, module in extra.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor):
        return self.how(self, x)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("how", "extra", "where"),
    [
        (
            lambda m, x: F.relu(m.stem(x)) @ m.table.weight.T,
            {"table": nn.Embedding(3, 4)},
            "'table'",
        ),
        (lambda m, x: m.head(F.linear(F.relu(m.stem(x)), m.middle.weight)), {}, "'middle'"),
        (
            lambda m, x: m.head(m.rnn(m.stem(x))[0]),
            {"rnn": nn.RNN(4, 4, batch_first=True)},
            "'rnn'",
        ),
    ],
    ids=["tied table", "functional layer", "recurrent"],
)
def test_weights_outside_called_layers_are_refused(how, extra, where: str) -> None:
    x = X[:, None] if "rnn" in extra else X
    with pytest.raises(fb.AttachError, match=f"a chain cannot see into {where}.*true weights"):
        fb.attach(Wired(how, **extra), fb.FA(), example=x)


class Factors(nn.Module):
    """Parameters and a buffer that a net makes a matrix of."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("turn", torch.randn(4, 4))


LOW = {"left": (4, 2), "right": (2, 4)}
COMPOSED = {
    "low rank": (LOW, lambda f: f.left @ f.right),
    "low rank, scaled": (LOW, lambda f: 0.5 * (f.left @ f.right).t()),
    "three factors": ({**LOW, "middle": (2, 2)}, lambda f: f.left @ f.middle @ f.right),
    "by einsum": (LOW, lambda f: torch.einsum("ir,rj->ij", f.left, f.right)),
    "turned by a buffer": ({"W": (4, 4)}, lambda f: f.W @ f.turn),
    "turned by a part of one": ({"W": (4, 2)}, lambda f: f.W @ f.turn[:2]),
    "with a square beside it": ({"W": (4, 4), "low": (2, 4)}, lambda f: f.W + f.low.t() @ f.low),
    "by its spectral norm": ({"W": (4, 4)}, lambda f: f.W / (f.turn[0] @ f.W @ f.turn[1])),
    "symmetric": ({"W": (4, 2)}, lambda f: f.W @ f.W.t()),
}


@pytest.mark.whole
@pytest.mark.parametrize("kind", COMPOSED)
@pytest.mark.parametrize("batch", [4, 5])  # a batch may have as many samples as a matrix has rows
def test_a_weight_that_is_a_product_is_a_hidden_weight(kind: str, batch: int) -> None:
    shapes, make = COMPOSED[kind]
    factors = Factors(**shapes)
    x = torch.randn(batch, 4)
    for how in (
        lambda m, x: m.head(F.relu(m.stem(x)) @ make(m.factors)),
        lambda m, x: m.head(F.linear(m.stem(x), make(m.factors), m.middle.bias)),
        lambda m, x: m.head((make(m.factors) @ m.stem(x)[..., None])[..., 0]),
    ):
        with pytest.raises(fb.AttachError, match=r"cannot see into 'factors'.*true weights"):
            fb.attach(Wired(how, factors=factors), fb.FA(), example=x)


def test_queries_that_layers_make_of_parameters_are_no_weights() -> None:
    """What a called layer makes of a parameter is its own product, which is fed."""

    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.asked = nn.Parameter(torch.randn(3, 4))
            self.stem, self.query, self.key, self.head = (nn.Linear(4, n) for n in (4, 4, 4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.stem(x)
            shares = (self.query(self.asked) @ self.key(h).mT).softmax(-1)
            return self.head((shares @ h).mean(1))

    learner = fb.attach(Asked(), fb.FA(), example=torch.randn(5, 6, 4))
    assert {edge.site.weight for edge in learner.graph.edges} >= {"key.weight", "head.weight"}
    # the parameter is a site itself, and its segment has nothing else
    assert learner.plan.segments[0].parameters == ("asked",)
    assert not learner.plan.unreached


def test_parameters_that_are_only_added_are_harmless() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.position = (
                nn.Linear(4, 4),
                nn.Linear(4, 3),
                nn.Parameter(torch.zeros(6, 4)),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(x) + self.position)

    fb.attach(Added(), fb.FA(), example=torch.randn(2, 6, 4))


def test_a_tensor_that_is_not_the_models_is_no_hidden_weight() -> None:
    outside = torch.randn(4, 4, requires_grad=True)
    learner = fb.attach(Wired(lambda m, x: m.head(m.stem(x) @ outside)), fb.FA(), example=X)
    assert [edge.site.weight for edge in learner.graph.edges] == ["head.weight"]


def test_every_output_comes_down_by_arcs() -> None:
    """A second head's error must not reach the trunk through that head's true weights."""
    model = Wired(lambda m, x: ((h := F.relu(m.stem(x))), m.head(h), m.middle(h))[1:])
    learner = fb.attach(model, fb.FA(), example=X, output=lambda o: o[0])
    for edge in learner.graph.edges:
        learner.feedback_of(edge).zero_()
    first, second = learner(X)
    (first.sum() + second.square().sum()).backward()
    assert model.stem.weight.grad.abs().max() == 0
    assert model.middle.weight.grad.abs().max() > 0


def test_reentrant_checkpoints_are_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    model = Wired(lambda m, x: m.head(checkpoint(m.middle, m.stem(x), use_reentrant=True)))
    with pytest.raises(fb.AttachError, match="'middle' runs without gradients"):
        fb.attach(model, fb.KolenPollack(), example=X)


def test_subclasses_that_change_the_layer_are_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, 2 * self.weight, self.bias)

    with pytest.raises(
        fb.AttachError, match="'1' is a Doubled, which changes how Linear uses its weight"
    ):
        fb.attach(nn.Sequential(nn.Linear(4, 4), Doubled(4, 3)), fb.FA(), example=X)


def test_kolen_pollack_needs_weights_of_the_layers_own() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[4].weight = tied[2].weight
    with pytest.raises(
        fb.AttachError, match=r"'2.weight', which is tied \(2.weight and 4.weight\)"
    ):
        fb.attach(tied, fb.KolenPollack(), example=X)
    normed = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(fb.AttachError):
        fb.attach(normed, fb.KolenPollack(), example=X)
    with pytest.raises(fb.AttachError, match="re-parametrised"):
        fb.attach(normed, fb.KolenPollack(), example=X, sites=["1"])


def test_kolen_pollack_leaves_feedback_of_frozen_weights_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model[2].weight.requires_grad_(False)
    learner = fb.attach(model, fb.KolenPollack(), example=X)
    learner(X).sum().backward()
    frozen, last = (learner.feedback_of(edge) for edge in learner.graph.edges)
    assert frozen.grad is None
    assert torch.equal(last.grad, model[4].weight.grad)
    assert model[0].weight.grad.abs().max() > 0


def test_predicates_skip_what_a_chain_cannot_feed() -> None:
    model, x, _ = small()
    learner = fb.attach(model, fb.FA(), example=x, sites=lambda name, m: isinstance(m, nn.Conv2d))
    assert [edge.site.weight for edge in learner.graph.edges] == ["2.weight"]


def test_kernels_fit_every_image_size() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    learner = fb.attach(model, fb.FA(), example=torch.randn(2, 1, 8, 8))
    with torch.no_grad():
        for edge in learner.graph.edges:
            learner.feedback_of(edge).copy_(model.get_parameter(edge.site.weight))
    x = torch.randn(3, 1, 11, 7)
    learner(x).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with learner.exact():
        learner(x).square().sum().backward()
    for got, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad)
