"""Chains whose feedback learns to be like the forward weights: weight mirror, and the alignments of Kunin et al."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from chains import F64, angle, awkward, chain_step, layer_of, step, weight_of
from pairs import CONV, MLP, TOKENS, Pair, assert_close, loss_fn
from test_chain import LAYERS_2D
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.operators import LayerForm
from feedbackward.rules.chain import layer_alignment as primitives

ALIGNED = {
    "information_alignment": fb.rules.InformationAlignment(),
    "symmetric_alignment": fb.rules.SymmetricAlignment(),
    "activation_alignment": fb.rules.ActivationAlignment(),
    "self_alignment": fb.rules.SelfAlignment(self_product=1.0),
    "information_alignment, raw": fb.rules.InformationAlignment(
        standardize=False, amp=1.0, null=2.0, decay=3.0
    ),
    "activation_alignment, raw": fb.rules.ActivationAlignment(
        standardize=False, sparse=2.0, amp=3.0
    ),
}


def angles(learner: fb.Learner) -> list[float]:
    with torch.no_grad():
        return [angle(weight_of(learner, e), learner.feedback_of(e)) for e in learner.graph.edges]


# --- the chain itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [fb.rules.WeightMirror(), *ALIGNED.values()], ids=str)
@pytest.mark.parametrize("pair", [MLP, CONV], ids=str)
def test_signals_go_through_b(pair: Pair, rule: fb.Rule) -> None:
    model = pair.model()
    learner = pair.attach(rule, model)
    B = {layer_of(e): learner.feedback_of(e).detach().numpy() for e in learner.graph.edges}
    got = step(learner, *pair.batch())
    for name, gradient in chain_step(pair, model, B).items():
        assert_close(got[name], gradient, name)


# --- weight mirror -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS_2D)
def test_mirror_estimates_the_weights(name: str) -> None:
    """-grad at B = 0 is an estimate of W without bias: of 4000 samples, relative errors of sqrt(fan_in / samples)."""
    model, x = awkward(name)
    learner = fb.attach(model, fb.rules.WeightMirror(samples=4000), example=x)
    for B in learner.feedback.parameters():
        nn.init.zeros_(B)
    learner.feedback_step(x)
    for edge in learner.graph.edges:
        W = weight_of(learner, edge)
        fan = W[0].numel() if not edge.operator.form.transposed else W.shape[0] * W[0, 0].numel()
        error = (learner.feedback_of(edge).grad + W).norm() / W.norm()
        assert error < 1.3 * math.sqrt(fan / 4000), edge.site.name


def test_mirror_phase_turns_b_towards_w_and_nothing_else_moves() -> None:
    """On strided, grouped and dilated convolutions and on Linear layers; B nears W / decay."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 8, 3, stride=2, groups=2, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Conv2d(8, 6, 3, dilation=2, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 12), nn.Tanh(),
        nn.Linear(12, 4),
    )  # fmt: skip
    x = torch.randn(4, 2, 8, 8)
    learner = fb.attach(model, fb.rules.WeightMirror(decay=0.5), example=x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(learner.feedback.parameters(), lr=0.2)
    start = angles(learner)
    assert min(start) > 60
    for _ in range(60):
        learner.feedback_step(x)
        optimizer.step()
        optimizer.zero_grad()
    assert max(angles(learner)) < 20
    for edge in learner.graph.edges:
        ratio = learner.feedback_of(edge).norm() / weight_of(learner, edge).norm()
        assert ratio.item() == pytest.approx(2.0, rel=0.1)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mirror_learns_in_its_phase_only() -> None:
    learner = MLP.attach(fb.rules.WeightMirror())
    x, y = MLP.batch()
    step(learner, x, y)
    assert all(B.grad is None for B in learner.feedback.parameters())
    torch.manual_seed(3)
    learner.feedback_step(x)
    first = [B.grad.clone() for B in learner.feedback.parameters()]
    learner.feedback.zero_grad()
    torch.manual_seed(3)
    learner.feedback_step(torch.zeros_like(x))  # the inputs do not matter
    for B, gradient in zip(learner.feedback.parameters(), first, strict=True):
        assert torch.equal(B.grad, gradient)
    with torch.autocast("cpu", torch.bfloat16):
        learner.feedback_step(x)
    with pytest.raises(fb.AttachError, match=r"samples >= 1 .* got 0"):
        fb.rules.WeightMirror(samples=0)


# --- Kunin et al. 2020: each primitive against autograd on its formula --------------------------------------------


def formula(name: str, layer: nn.Module, W: Tensor, B: Tensor, x: Tensor) -> Tensor:
    """The primitive as a number, from the layer's own forward pass and autograd's adjoint of it."""

    def forward(weight: Tensor, h: Tensor) -> Tensor:
        bias = torch.zeros_like(layer.bias) if layer.bias is not None else None
        kept = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return torch.func.functional_call(layer, kept, h)

    p, q = forward(W, x), forward(B, x)
    rows = p.numel() / p.shape[1 if p.dim() != 3 else 2]  # samples, and positions or tokens
    if name == "decay":
        return W.square().sum() + B.square().sum()
    if name == "sparse":
        return (p.square().sum() + q.square().sum()) / rows
    if name == "self_product":
        return -sum(W[i].flatten() @ B[i].flatten() for i in range(len(W)))
    if name == "amp":
        return -(p * q).sum() / rows
    h = x.detach().clone().requires_grad_()
    (r,) = torch.autograd.grad(forward(B, h), h, p, create_graph=True)
    return r.square().sum() / rows


@pytest.mark.parametrize("name", ["decay", "sparse", "self_product", "amp", "null"])
@pytest.mark.parametrize("layer", ["linear", *LAYERS_2D])
def test_primitives_are_the_gradients_of_their_formulas(layer: str, name: str) -> None:
    torch.manual_seed(0)
    if layer == "linear":
        module, x = nn.Linear(6, 4).double(), torch.randn(5, 6, dtype=F64)
    else:
        module, x = LAYERS_2D[layer]().double(), torch.randn(3, 4, 9, 8, dtype=F64)
    W = module.weight.detach()
    B = torch.randn_like(W).requires_grad_()
    (expected,) = torch.autograd.grad(formula(name, module, W, B, x), B)
    seen = primitives.Seen(fb.operators.LayerShaped(LayerForm.of(module)), W, B.detach(), x)
    assert_close(getattr(primitives, name)(seen), expected, name)


SUMS = {
    "information_alignment": {"amp": 1.0, "null": 0.5, "decay": 0.5},
    "information_alignment, raw": {"amp": 1.0, "null": 2.0, "decay": 3.0},
    "symmetric_alignment": {"decay": 0.5, "self_product": 1.0},
    "activation_alignment": {"sparse": 0.5, "amp": 1.0},
    "activation_alignment, raw": {"sparse": 2.0, "amp": 3.0},
    "self_alignment": {"self_product": 1.0},
}


@pytest.mark.parametrize("name", ALIGNED)
@pytest.mark.parametrize("pair", [MLP, CONV, TOKENS], ids=str)
def test_feedback_descends_the_sum_of_its_primitives(pair: Pair, name: str) -> None:
    """B.grad after one backward pass, whatever multiplies the loss; and W's gradient has nothing of it."""
    model = pair.model()
    learner = pair.attach(ALIGNED[name], model)
    x, y = pair.batch()
    inputs: dict[str, Tensor] = {}
    for layer, module in model.named_children():
        module.register_forward_hook(
            lambda m, args, out, layer=layer: inputs.update({layer: args[0]})
        )
    (3 * loss_fn(y)(learner(x))).backward()
    for edge in learner.graph.edges:
        layer = layer_of(edge)
        B = learner.feedback_of(edge)
        W = weight_of(learner, edge).detach()
        module, h, n = model.get_submodule(layer), inputs[layer].detach(), 1
        if name in ("information_alignment", "activation_alignment"):
            axes = (0, 2, 3) if h.dim() == 4 else tuple(range(h.dim() - 1))
            h = h - h.mean(axes, keepdim=True)
            h, n = h / h.square().mean().sqrt(), W[0].numel()
        total = sum(
            factor / n * formula(primitive, module, W, B, h)
            for primitive, factor in SUMS[name].items()
        )
        (expected,) = torch.autograd.grad(total, B)
        assert_close(B.grad, expected, layer)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "lr", "steps", "below"),
    [
        ("symmetric_alignment", 0.1, 60, 1.0),
        ("self_alignment", 0.1, 200, 35.0),
        ("activation_alignment", 2.0, 1200, 20.0),
        ("information_alignment", 0.2, 600, 60.0),
    ],
)
def test_feedback_turns_towards_the_weights_in_training(
    name: str, lr: float, steps: int, below: float
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Tanh(),
        nn.Flatten(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 3),
    ).to(F64)  # fmt: skip
    x, y = torch.randn(64, 1, 7, 7, dtype=F64), torch.arange(64) % 3
    learner = fb.attach(model, ALIGNED[name], example=x)
    groups = fb.param_groups(learner, model={"lr": 0.01}, feedback={"lr": lr})
    optimizer = torch.optim.SGD(groups)
    start, losses = angles(learner), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(learner(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(
        now < min(before - 20, below) for now, before in zip(angles(learner), start, strict=True)
    )
    assert losses[-1] < losses[0]


def test_information_alignment_settles_where_the_theory_says() -> None:
    """On white inputs at alpha/2 (gamma + beta W W^T)^-1 W."""
    torch.manual_seed(0)
    rule = fb.rules.InformationAlignment(amp=1.5, null=0.3, decay=0.2)
    x = torch.linalg.qr(torch.randn(9, 6, dtype=F64))[0] * 3.0  # E x^T x = 1
    W, B = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64)
    layer = fb.operators.LayerShaped(LayerForm.of(nn.Linear(6, 4)))
    for _ in range(3000):
        seen = primitives.Seen(layer, W, B, x)
        B = B - 0.05 * sum(factor * primitive(seen) for factor, primitive in rule.terms)
    expected = 0.75 * torch.linalg.solve(0.2 * torch.eye(4, dtype=F64) + 0.3 * W @ W.t(), W)
    assert_close(B, expected, tolerance=1e-9)


def test_alignment_cannot_be_scaled_with_the_loss() -> None:
    learner = MLP.attach(fb.rules.SymmetricAlignment())
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(fb.FeedbackError, match="GradScaler would shrink"),
    ):
        learner(MLP.batch()[0])
