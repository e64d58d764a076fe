"""Learners inside the tools of everyday training: mixed precision, accumulation, memory formats, copies, averages."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
import zoo
from torch import Tensor, nn
from wired import two_layers

import feedbackward as fb

RULES = [fb.DFA(), fb.DKP.published(), fb.DKP.published(center=True)]
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def learner_of(name: str, rule: fb.Rule, seed: int = 0) -> tuple[fb.Learner, Tensor]:
    case = zoo.case(name)
    model, example = zoo.build(case, seed)
    return fb.attach(model, rule, example=example, **case.options), example


def loss(out: Tensor) -> Tensor:
    return zoo.loss_of(zoo.case("mlp"), out.float())


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(learner: nn.Module, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    learner.zero_grad()
    torch.manual_seed(3)
    (scale * loss(learner(x))).backward()
    return grads(learner)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 0.0) -> None:
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert got[name].dtype == grad.dtype
        assert (got[name] - grad).norm() <= rtol * (grad.norm() + 1e-4), name


# --- mixed precision ----------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("name", ["group_norms", "in_place", "vit_blocks", "attention"])
def test_bfloat16_autocast(name: str, rule: fb.Rule) -> None:
    """Feedback stays in float32; gradients differ by the rounding of bfloat16 (8 bits) only. A centred gradient is the
    difference of two rounded products, so its rounding is that of the larger one, the gradient that is not centred."""
    learner, x = learner_of(name, rule)
    expected = step(learner, x)
    larger = step(*learner_of(name, fb.DKP.published())) if rule.least_batch > 1 else expected
    learner, x = learner_of(name, rule)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        out = learner(x)
    loss(out).backward()
    assert out.dtype == torch.bfloat16
    assert {B.dtype for B in learner.feedback.state_dict().values()} == {torch.float32}
    assert_rounded(grads(learner), expected, larger, zoo.case(name).silent)


def assert_rounded(
    got: dict[str, Tensor],
    expected: dict[str, Tensor],
    larger: dict[str, Tensor],
    silent: tuple[str, ...],
) -> None:
    for key, grad in got.items():
        assert grad.dtype == torch.float32
        if key.removeprefix("model.") not in silent:
            assert (grad - expected[key]).norm() < 0.1 * larger[key].norm(), key


@every_rule
def test_loss_scaling(rule: fb.Rule) -> None:
    """Signals and the gradients of feedback scale with the loss, so that unscaling restores them."""
    learner, x = learner_of("group_norms", rule)
    expected = step(learner, x)
    got = step(learner, x, scale=1024.0)
    assert_close({name: grad / 1024 for name, grad in got.items()}, expected, rtol=1e-6)


@every_rule
def test_float16_with_grad_scaler(rule: fb.Rule) -> None:
    """A step with autocast and GradScaler is the plain step to float16's rounding; an overflow skips it whole."""
    plain, x = learner_of("group_norms", rule)
    expected = step(plain, x)
    learner, x = learner_of("group_norms", rule)
    before = copy.deepcopy(learner.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.float16):
        out = learner(x)
    scaler.scale(loss(out)).backward()
    scaler.unscale_(optimizer)
    assert_close(grads(learner), expected, rtol=0.05)
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(before[key], value) for key, value in learner.state_dict().items())
    before = copy.deepcopy(learner.state_dict())
    optimizer.zero_grad()
    (scaler.scale(loss(learner(x))) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0
    for key, value in learner.named_parameters():
        assert torch.equal(before[key], value), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["group_norms", "in_place", "vit_blocks"])
def test_autocast_on_cuda(name: str, rule: fb.Rule, dtype: torch.dtype) -> None:
    learner, x = learner_of(name, rule)
    cpu = step(learner, x)
    learner, x = learner.cuda(), x.cuda()
    expected = step(learner, x)
    assert_close({key: grad.cpu() for key, grad in expected.items()}, cpu, rtol=5e-2)
    larger = (
        step(learner_of(name, fb.DKP.published())[0].cuda(), x)
        if rule.least_batch > 1
        else expected
    )
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    learner.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cuda", dtype):
        out = learner(x)
    scaler.scale(loss(out)).backward()
    scaler.unscale_(optimizer)
    assert_rounded(grads(learner), expected, larger, zoo.case(name).silent)


# --- accumulation, memory format ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES[:2], ids=str)
@pytest.mark.parametrize("name", ["group_norms", "gpt_blocks", "halves"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name: str, rule: fb.Rule) -> None:
    """Without batch statistics a sum over samples may be taken in parts; also with both forwards before backward."""
    learner, x = learner_of(name, rule)
    learner.double()
    x = x.double() if x.is_floating_point() else x
    learner(x).square().sum().backward()
    whole = grads(learner)
    learner.zero_grad()
    for part in x.split([2, 3]):
        learner(part).square().sum().backward()
    assert_close(grads(learner), whole, rtol=1e-12)
    learner.zero_grad()
    outs = [learner(part) for part in x.split([2, 3])]
    sum(out.square().sum() for out in reversed(outs)).backward()
    assert_close(grads(learner), whole, rtol=1e-12)


@every_rule
@pytest.mark.parametrize("name", ["resnet", "in_place", "autoencoder", "mobilenet"])
def test_channels_last(name: str, rule: fb.Rule) -> None:
    learner, x = learner_of(name, rule)
    learner.eval()  # no dropout masks, which depend on the layout
    expected = step(learner, x)
    learner, x = learner_of(name, rule)
    learner.eval()
    learner.to(memory_format=torch.channels_last)
    assert_close(step(learner, x.to(memory_format=torch.channels_last)), expected, rtol=1e-5)
    model, x = zoo.build(zoo.case(name))
    x = x.to(memory_format=torch.channels_last)
    learner = fb.attach(
        model.to(memory_format=torch.channels_last), rule, example=x, **zoo.case(name).options
    )
    learner.eval()
    assert_close(step(learner, x), expected, rtol=1e-5)


# --- copies, averages, files --------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("name", ["in_place", "resnet", "dict_output", "recurrent"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_work_alone(name: str, rule: fb.Rule, copied) -> None:
    case = zoo.case(name)
    learner, x = learner_of(name, rule)
    twin = copied(learner)
    assert str(twin) == str(learner)
    for model in (learner, twin):
        torch.manual_seed(3)
        zoo.loss_of(case, model(x)).backward()
    assert_close(grads(twin), grads(learner))
    twin.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.model.modules())
    learner.zero_grad()
    torch.manual_seed(3)
    zoo.loss_of(case, learner(x)).backward()
    assert_close(grads(learner), grads(twin))


def test_a_copy_of_the_model_alone_is_plain() -> None:
    learner, x = learner_of("tokens", fb.DKP.published())
    plain, _ = zoo.build(zoo.case("tokens"))
    assert_close(step(copy.deepcopy(learner.model), x), step(plain, x))


def test_moving_average() -> None:
    learner, x = learner_of("in_place", fb.DKP.published())
    average = torch.optim.swa_utils.AveragedModel(
        learner, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    average.update_parameters(learner)
    start = copy.deepcopy(learner.state_dict())
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    step(learner, x)
    optimizer.step()
    average.update_parameters(learner)
    for key, value in average.module.named_parameters():
        torch.testing.assert_close(value, (start[key] + learner.state_dict()[key]) / 2)
    average.eval()
    with torch.no_grad():
        assert torch.equal(average(x), average.module.model(x))


@every_rule
def test_state_survives_files(rule: fb.Rule, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    learner, x = learner_of("resnet", rule)
    buffer = io.BytesIO()
    torch.save(learner.state_dict(), buffer)
    buffer.seek(0)
    safetensors.save_file(learner.state_dict(), tmp_path / "learner.safetensors")
    for state in (
        torch.load(buffer, weights_only=True),
        safetensors.load_file(tmp_path / "learner.safetensors"),
    ):
        other = fb.attach(zoo.build(zoo.case("resnet"), seed=7)[0], rule, example=x, seed=7)
        assert not torch.equal(
            other.feedback_of(other.graph.edges[0]), learner.feedback_of(learner.graph.edges[0])
        )
        other.load_state_dict(state)
        assert_close(step(other, x), step(learner, x))
    plain, _ = zoo.build(zoo.case("resnet"), seed=7)
    plain.load_state_dict(learner.model.state_dict())


@every_rule
def test_float64(rule: fb.Rule) -> None:
    """A centred gradient is the difference of two rounded products: its rounding is that of the larger one."""
    learner, x = learner_of("group_norms", rule)
    expected = step(learner, x)
    learner.to(torch.float64)
    got = {name: grad.float() for name, grad in step(learner, x.double()).items()}
    assert all(p.dtype == torch.float64 for p in learner.state_dict().values())
    if getattr(rule, "center", False):
        whole = step(learner_of("group_norms", replace(rule, center=False))[0], x)
        for name in [name for name in expected if name.startswith("feedback.")]:
            grad = expected.pop(name)
            assert (got.pop(name) - grad).norm() <= 1e-5 * whole[name].norm()
    assert_close(got, expected, rtol=1e-5)


# --- several learners, inputs under no_grad -----------------------------------------------------------------------


def test_two_learners_on_one_model() -> None:
    """Each trains by its own rule and sites, whichever was attached first; detaching one leaves the other."""
    alone = {}
    for rule, options in ((fb.DKP.published(), {}), (fb.DFA(), {"sites": ["3", "6"]})):
        model, x = zoo.build(zoo.case("in_place"))
        alone[rule.name] = step(fb.attach(model, rule, example=x, **options), x)
    model, x = zoo.build(zoo.case("in_place"))
    start = copy.deepcopy(model.state_dict())
    first = fb.attach(model, fb.DKP.published(), example=x)
    second = fb.attach(model, fb.Frozen(), example=x, sites=["3"])
    assert_close(step(first, x), alone["dkp"])
    model.load_state_dict(start)
    assert {name for name, grad in step(second, x).items()} == {
        f"model.{i}.{p}" for i in (4, 7, 9) for p in ("weight", "bias")
    }
    third = fb.attach(model, fb.DFA(), example=x, sites=["3", "6"])
    model.load_state_dict(start)
    assert_close(step(third, x), alone["dfa"])
    second.detach()
    model.load_state_dict(start)
    assert_close(step(first, x), alone["dkp"])
    with pytest.raises(fb.AttachError, match="was detached; attach the model again"):
        second(x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_attach_in_any_mode(context, training: bool) -> None:
    model, x = zoo.build(zoo.case("mlp"))
    model.train(training)
    model[3].eval()  # a part that its owner keeps in evaluation mode
    modes = [m.training for m in model.modules()]
    with context():
        learner = fb.attach(model, fb.DKP.published(), example=x)
    assert [m.training for m in model.modules()] == modes
    assert learner.plan.unreached == ()
    assert [site.name for site in learner.sites] == ["1", "5"]
    learner(x).sum().backward()
    assert all(p.grad is not None for p in learner.parameters())
    with torch.no_grad():
        assert not learner(x).requires_grad
    with torch.inference_mode():
        learner(x)


def test_an_auxiliary_loss_on_a_hidden_activity_reaches_no_layer_below_a_cut() -> None:
    """A returned activity is the one behind its cut where a module made it: a loss on it trains nothing. Where a
    function made it, it is still tied to the layers of its own segment, which such a loss trains by its true gradient."""
    for act, trained in ((nn.Tanh(), []), (None, ["b.bias", "b.weight"])):
        modules = {"act2": nn.ReLU()} | ({"act": act} if act else {})
        model = two_layers(
            lambda m, x: (m.out(h := getattr(m, "act", torch.tanh)(m.b(m.act2(m.a(x))))), h),
            **modules,
        )
        x = torch.randn(5, 6)
        learner = fb.attach(model, fb.DKP.published(), example=x, output=lambda o: o[0])
        _, hidden = learner(x)
        if hidden.requires_grad:
            hidden.square().sum().backward()
        assert sorted(name for name, p in model.named_parameters() if p.grad is not None) == trained
        with learner.exact():
            learner(x)[1].square().sum().backward()
        assert model.a.weight.grad is not None
