"""What `attach` refuses: one clear sentence that names the thing and the fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from wired import Net, X

import feedbackward as fb


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def named() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.encoder(x).relu()), encoder=nn.Linear(6, 8), head=nn.Linear(8, 3)
    )


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def two_outputs(form: str) -> Callable[[], nn.Module]:
    return lambda: zoo.Outputs(form)


def scalar() -> nn.Module:
    return Net(lambda m, x: m.body(x).square().mean(), body=mlp())


def learner() -> fb.Learner:
    return fb.attach(mlp(), fb.DKP.published(), example=X)


def unused() -> nn.Module:
    return Net(lambda m, x: m.body(x), body=mlp(), spare=nn.Linear(6, 6))


def loop() -> nn.Module:
    return Net(
        lambda m, x: m.out(m.a(m.b(m.a(m.c(x))))),
        a=nn.ReLU(),
        b=nn.Linear(5, 6),
        c=nn.Linear(6, 5),
        out=nn.Linear(6, 3),
    )


# model, what is wrong in the call, the error, what its message must say
MAP = torch.randn(4, 3, 4, 4)
WINDOWS = r"'fc.input' has leading dimensions \[16\] .*\[4\]: .*name modules around that part"


def windows() -> nn.Module:
    """A layer over the windows of a map."""

    def call(m: Net, x: Tensor) -> Tensor:
        h = m.conv(x).unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(-1, 4, 6)
        return m.out(m.fc(h).relu().unflatten(0, (len(x), 4)).mean((1, 2)))

    return Net(call, conv=nn.Conv2d(3, 6, 1), fc=nn.Linear(6, 6), out=nn.Linear(6, 3))


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "no layer": (
        lambda: nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.LayerNorm(6)),
        {},
        fb.AttachError,
        r"no module of the model multiplies.*name the sites yourself with `sites=",
    ),
    "one layer": (
        lambda: nn.Linear(6, 3),
        {},
        fb.AttachError,
        r"Linear has no activity to feed.*without hidden layers",
    ),
    "no parameters": (
        lambda: nn.Sequential(nn.ReLU()),
        {},
        fb.AttachError,
        "Sequential has no floating-point parameters",
    ),
    "not a module": (
        lambda: torch.relu,
        {},
        fb.AttachError,
        r"must be a torch\.nn\.Module, not builtin_function",
    ),
    "a learner": (learner, {}, fb.AttachError, r"is a Learner already.*learner\.detach\(\)"),
    "a learner inside": (
        lambda: nn.Sequential(learner(), nn.Linear(3, 3)),
        {},
        fb.AttachError,
        r"its part '0' is a Learner already",
    ),
    "compiled": (
        lambda: torch.compile(mlp()),
        {},
        fb.AttachError,
        r"is compiled.*then `torch\.compile\(learner\)`",
    ),
    "data parallel": (
        lambda: nn.DataParallel(mlp()),
        {},
        fb.AttachError,
        r"is a DataParallel.*then wrap the learner",
    ),
    "rule class": (
        mlp,
        {"rule": fb.DFA},
        fb.AttachError,
        r"instance of a Rule, for example DFA\(\)",
    ),
    "wrong shape": (
        mlp,
        {"example": torch.randn(5, 7)},
        fb.AttachError,
        r"Sequential failed on the example \(tensors \[\(5, 7\)\]\).*5x7 and 6x8.*Pass an `example`",
    ),
    "wrong keys": (
        named,
        {"example": {"y": X}},
        fb.AttachError,
        r"failed on the example .*'y'.*as tensor, tuple or dict",
    ),
    "input that requires a gradient": (
        mlp,
        {"example": X.clone().requires_grad_()},
        fb.AttachError,
        r"input requires a gradient.*or detach the input",
    ),
    "no example": (
        mlp,
        {"example": None},
        fb.AttachError,
        "must be a tensor, a tuple or a dict .* not NoneType",
    ),
    "batch norm, one sample": (
        batch_norm,
        {"example": X[:1]},
        fb.AttachError,
        "needs a batch of at least 2",
    ),
    "unknown site": (
        named,
        {"sites": ["encodr"]},
        fb.SiteError,
        r"no module named 'encodr'; nearest names: encoder",
    ),
    "unknown site by a far name": (
        mlp,
        {"sites": ["relu"]},
        fb.SiteError,
        r"named 'relu'; its modules are 0, 1, 2",
    ),
    "unknown source": (
        named,
        {"error_at": "heads"},
        fb.SiteError,
        r"named 'heads'; nearest names: head",
    ),
    "site beyond the source": (
        mlp,
        {"sites": ["3"], "error_at": "2"},
        fb.SiteError,
        r"'3' is not on the way to the source.*Choose an earlier site or a later error_at",
    ),
    "site that is the source": (
        mlp,
        {"sites": ["4"]},
        fb.SiteError,
        "'4' is not on the way to the source",
    ),
    "site that is not called": (
        unused,
        {"sites": ["spare"]},
        fb.SiteError,
        "'spare' is not called",
    ),
    "site whose calls have several shapes": (
        loop,
        {"sites": ["a"]},
        fb.SiteError,
        "'a' is called 2 times .* called once",
    ),
    "nothing picked": (
        mlp,
        {"sites": lambda name, module: False},
        fb.AttachError,
        "no activity to feed",
    ),
    "no block": (
        mlp,
        {"sites": "blocks"},
        fb.AttachError,
        r"found no residual or repeated block in Sequential",
    ),
    "several outputs, tuple": (
        two_outputs("tuple"),
        {},
        fb.AttachError,
        r"returns tuple with \[0\], \[1\]: say which.*output=lambda o: o\[0\]",
    ),
    "several outputs, dict": (
        two_outputs("dict"),
        {},
        fb.AttachError,
        r"returns dict with hidden, logits: say which.*output=lambda o: o\[\"logits\"\]",
    ),
    "output is not the model's": (
        mlp,
        {"output": lambda out: out * 2},
        fb.AttachError,
        r"output= must return one of the tensors that the model returns.*in the loss",
    ),
    "a loss as output": (scalar, {}, fb.AttachError, r"single number \(a loss\?\).*error_at="),
    "centred, one sample": (
        mlp,
        {"rule": fb.DKP.published(center=True), "example": X[:1]},
        fb.SiteError,
        "needs a batch of at least 2, got 1",
    ),
    "multi-head attention first": (
        lambda: Net(
            lambda m, x: m.fc(m.mix(x, x, x)[0][-1]),
            mix=nn.MultiheadAttention(6, 2),
            fc=nn.Linear(6, 3),
        ),
        {"example": torch.randn(4, 5, 6), "sites": ["mix"]},
        fb.SiteError,
        r"'mix' has leading dimensions \[4\] .*\[5\]: the batch must come first",
    ),
    "a complex output": (
        lambda: Net(
            lambda m, x: m.fc(m.mix(x).relu()) * torch.tensor(1j),
            mix=nn.Linear(6, 6),
            fc=nn.Linear(6, 3),
        ),
        {},
        fb.SiteError,
        r"'output' is complex, .*error_at",
    ),
    "windows, which are more than samples": (windows, {"example": MAP}, fb.SiteError, WINDOWS),
    "windows, a local loss": (
        windows,
        {"example": MAP, "rule": fb.DGL()},
        fb.SiteError,
        WINDOWS,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    build, wrong, error, message = REFUSED[name]
    model = build()
    options = {"example": X, "rule": fb.DKP.published(), **wrong}
    modules = (
        list(model.modules())
        if isinstance(model, nn.Module) and not isinstance(model, fb.Learner)
        else []
    )
    with pytest.raises(error, match=f"(?s){message}") as caught:
        fb.attach(model, options.pop("rule"), **options)
    text = str(caught.value)
    assert isinstance(caught.value, fb.FeedbackError)
    assert text.rstrip().endswith((".", "]", ")", "...")), "a whole sentence"
    if "learner" not in name:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules), (
            "hooks are left behind"
        )


def test_zero_fixed_feedback() -> None:
    with pytest.raises(fb.AttachError, match="zero feedback would never train a hidden layer"):
        fb.DFA(operator=fb.Dense("zeros"))


def test_inference_mode() -> None:
    with (
        torch.inference_mode(),
        pytest.raises(fb.AttachError, match=r"outside torch\.inference_mode"),
    ):
        fb.attach(mlp(), fb.DKP.published(), example=X)


def test_a_model_that_was_refused_still_works() -> None:
    model = batch_norm()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(fb.AttachError):
        fb.attach(model, fb.DKP.published(), example=X[:1])
    with pytest.raises(fb.SiteError):
        fb.attach(model, fb.DKP.published(), example=X, sites=["9"])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    fb.attach(model, fb.DKP.published(), example=X)(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
