"""Models of other packages, built from their configuration: blocks as sites, and the loss falls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feedbackward as fb

transformers = pytest.importorskip("transformers")
RULES = pytest.mark.parametrize("rule", [fb.DFA(), fb.DKP.published()], ids=["dfa", "dkp"])
LABELS = torch.arange(8) % 4


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    image = {"image_size": 16, "patch_size": 4, "num_labels": 4}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, **image, **options)
    )


def gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16, "vocab_size": 20}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends, **options))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2], layer_type="basic", num_labels=4
    )
    return transformers.ResNetForImageClassification(config)


def monai_resnet() -> nn.Module:
    """A ResNet-18 in small."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    return nets.ResNet(
        "basic", [2] * 4, [8, 8, 12, 12], spatial_dims=2, n_input_channels=3, num_classes=4
    )


def images(size: int) -> Tensor:
    return torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(1))


def words() -> Tensor:
    return torch.randint(0, 20, (8, 9), generator=torch.Generator().manual_seed(1))


def losses(learner: fb.Learner, loss: Callable[[], Tensor], steps: int = 30) -> list[float]:
    """The loss on one batch, over the steps of training on it; feedback learns slowly, as its authors have it."""
    groups = fb.param_groups(learner, model={"lr": 0.003}, feedback={"lr": 1e-4})
    optimizer = torch.optim.Adam(groups)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        for name, p in learner.named_parameters():
            assert p.grad is not None, name
            assert torch.isfinite(p.grad).all(), name
        optimizer.step()
        found.append(value.item())
    return found


def sites(learner: fb.Learner) -> list[str]:
    return [site.name for site in learner.sites]


@RULES
def test_vit(rule: fb.Rule) -> None:
    x = images(16)
    learner = fb.attach(vit(), rule, example=x, sites="blocks", output=lambda out: out.logits)
    assert sites(learner) == ["vit.layers.0", "vit.layers.1", "vit.layers.2"]
    assert learner.plan.shared == {}
    assert learner.plan.unreached == ()
    first, *_, last = losses(learner, lambda: F.cross_entropy(learner(x).logits, LABELS))
    assert last < 0.95 * first


@RULES
def test_gpt2_with_labels_inside(rule: fb.Rule) -> None:
    """The model computes its own loss, so the error is that of its head; tokens keep an error each. The tied embedding
    is the only weight that two segments train."""
    batch = {"input_ids": words(), "labels": words()}
    learner = fb.attach(gpt2(), rule, example=batch, sites="blocks", error_at="lm_head")
    assert sites(learner) == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
    assert learner.plan.shared == {"transformer.wte.weight": ("transformer.h.0", "head")}
    assert [(e.leading, e.site_shape, e.source_size) for e in learner.graph.edges] == 3 * [
        (2, (16,), 20)
    ]
    first, *_, last = losses(learner, lambda: learner(**batch).loss)
    assert last < 0.95 * first


def test_gpt2_with_its_loss_as_output_is_refused() -> None:
    batch = {"input_ids": words(), "labels": words()}
    with pytest.raises(fb.AttachError, match=r"single number \(a loss\?\).*error_at"):
        fb.attach(
            gpt2(), fb.DKP.published(), example=batch, sites="blocks", output=lambda out: out.loss
        )


def test_layers_of_a_class_of_their_own_are_layers() -> None:
    """GPT-2's layers are not torch's. Four of them are in a block, and the head takes what the last one makes."""
    model = gpt2()
    learner = fb.attach(model, fb.DKP.published(), example=words(), output=lambda out: out.logits)
    assert len(learner.sites) == 4 * len(model.transformer.h)
    assert learner.plan.unreached == ()
    # features of a token, whatever the number of tokens
    assert {site.tokens for site in learner.sites} == {1}


@pytest.mark.single
@RULES
@pytest.mark.parametrize("where", ["blocks", "layers"])
def test_transformers_resnet(rule: fb.Rule, where: str) -> None:
    x = images(32)
    learner = fb.attach(resnet(), rule, example=x, sites=where, output=lambda out: out.logits)
    stages = [f"resnet.encoder.stages.{i}.layers.{j}" for i in (0, 1) for j in (0, 1)]
    assert len(sites(learner)) == 9 if where == "layers" else sites(learner) == stages
    assert learner.plan.shared == {}
    first, *_, last = losses(learner, lambda: F.cross_entropy(learner(x).logits, LABELS))
    assert last < 0.95 * first


@pytest.mark.single
@RULES
@pytest.mark.parametrize("where", ["blocks", "layers"])
def test_monai_resnet(rule: fb.Rule, where: str) -> None:
    """Seventeen sites in a ResNet-18, one per activity between its layers, and no parameter in two segments."""
    x = images(32)
    learner = fb.attach(monai_resnet(), rule, example=x, sites=where)
    blocks = [f"layer{i}.{j}" for i in range(1, 5) for j in (0, 1)]
    assert len(sites(learner)) == 17 if where == "layers" else sites(learner) == blocks
    assert learner.plan.shared == {}
    first, *_, last = losses(learner, lambda: F.cross_entropy(learner(x), LABELS))
    assert last < 0.95 * first


def test_gradient_checkpointing_of_transformers() -> None:
    grads = []
    for repeat in (False, True):
        model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        if repeat:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = {"input_ids": words(), "labels": words()}
        learner = fb.attach(
            model, fb.DKP.published(), example=batch, sites="blocks", error_at="lm_head"
        )
        learner(**batch).loss.backward()
        grads.append([p.grad for p in learner.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_reentrant_checkpointing_of_transformers_is_refused() -> None:
    model = gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(fb.AttachError, match=r"use_reentrant=False"):
        fb.attach(
            model,
            fb.DKP.published(),
            example={"input_ids": words()},
            sites="blocks",
            error_at="lm_head",
        )
