"""Lightning takes a learner as it is; the callback adds targets, the phase and the angles."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from client_nets import needed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import feedbackward as fb
from feedbackward.errors import FeedbackError

pytestmark = pytest.mark.clients
pl = needed("lightning.pytorch")

from feedbackward.integrations.lightning import FeedbackCallback  # noqa: E402

X = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3
PUBLISHED = fb.DKP.published()


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


class Module(pl.LightningModule):
    def __init__(self, rule: fb.Rule) -> None:
        super().__init__()
        self.learner = fb.attach(net(), rule, example=X)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return F.cross_entropy(self.learner(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        groups = fb.param_groups(self.learner, feedback={"lr": 0.02})
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.cross_entropy(output, batch[1])


def fit(module: Any, size: int = 16, resume: Path | None = None, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, **options,
    }  # fmt: skip
    trainer = pl.Trainer(**settings)
    loader = DataLoader(TensorDataset(X, Y), batch_size=size)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def by_hand(rule: fb.Rule, steps: int = 1, clip: float = 0.0) -> dict[str, torch.Tensor]:
    """The parameters of a learner after steps on the whole data."""
    learner = Module(rule).learner
    groups = fb.param_groups(learner, feedback={"lr": 0.02})
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        if learner.attached.needs_target:
            learner.target(Y)
        F.cross_entropy(learner(X), Y).backward()
        if learner.attached.in_phase:
            learner.feedback_step(X, lambda output: F.cross_entropy(output, Y))
        if clip:
            torch.nn.utils.clip_grad_norm_(learner.parameters(), clip)
        optimizer.step()
    return dict(learner.named_parameters())


def assert_same(learner: fb.Learner, expected: dict[str, torch.Tensor]) -> None:
    for name, p in learner.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [fb.DFA(), PUBLISHED, fb.KolenPollack()], ids=lambda r: r.name)
def test_steps_need_no_callback(rule: fb.Rule) -> None:
    module = Module(rule)
    fit(module, max_epochs=3, gradient_clip_val=0.05)
    assert_same(module.learner, by_hand(rule, 3, clip=0.05))


@pytest.mark.parametrize("rule", [PUBLISHED, fb.DRTP()], ids=lambda r: r.name)
def test_accumulated_batches_are_the_whole_one(rule: fb.Rule) -> None:
    module = Module(rule)
    fit(module, size=4, accumulate_grad_batches=4, callbacks=[FeedbackCallback()])
    assert_same(module.learner, by_hand(rule))


@pytest.mark.parametrize("rule", [fb.DRTP(), fb.rules.DKPPC()], ids=lambda r: r.name)
def test_targets_and_phase_are_those_of_a_loop_by_hand(rule: fb.Rule) -> None:
    module = Module(rule)
    fit(module, max_epochs=3, callbacks=[FeedbackCallback(loss=loss)])
    assert_same(module.learner, by_hand(rule, 3))


@pytest.mark.parametrize("every", [1, 2])
def test_a_phase_for_every_step_not_for_every_batch(every: int) -> None:
    module = Module(fb.rules.FDFA())
    seen = []
    step = module.learner.feedback_step
    module.learner.feedback_step = lambda x, loss: (seen.append(x.args[0]), step(x, loss))  # type: ignore[method-assign]
    callback = FeedbackCallback(feedback_every=every)
    fit(module, size=2, accumulate_grad_batches=2, callbacks=[callback])
    assert [X.tolist().index(x[0].tolist()) for x in seen] == list(range(2, 16, 4 * every))
    assert all(p.abs().max() > 0 for p in module.learner.feedback.parameters())
    assert not module.learner.model._forward_pre_hooks


def test_two_optimizers_share_a_phase() -> None:
    """In manual optimization, W and B apart."""

    class Manual(Module):
        def training_step(self, batch: Any, index: int) -> None:
            self.manual_backward(super().training_step(batch, index))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            parts = self.learner.model, self.learner.feedback
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]

    module = Manual(fb.rules.FDFA())
    module.automatic_optimization = False
    calls = []
    step = module.learner.feedback_step
    module.learner.feedback_step = lambda x, loss: (calls.append(1), step(x, loss))  # type: ignore[method-assign]
    fit(module, size=4, callbacks=[FeedbackCallback()])
    assert len(calls) == 4
    fit(module, size=4, callbacks=[FeedbackCallback(feedback_every=2)])
    assert len(calls) == 6


@pytest.mark.parametrize("rule", [PUBLISHED, fb.DRTP()], ids=lambda r: r.name)
def test_the_angles_are_those_of_the_probe(rule: fb.Rule) -> None:
    module = Module(rule)
    twin = copy.deepcopy(module.learner)
    if rule.needs == "target":
        twin.target(Y)
    expected = fb.probe(twin, lambda output: F.cross_entropy(output, Y), X, jacobian=False)
    trainer = fit(module, callbacks=[FeedbackCallback(loss=loss, probe_every=1)])
    logged = {k: float(v) for k, v in trainer.logged_metrics.items()}
    assert logged == {
        f"learner/angle/{name}": pytest.approx(site.angle, abs=1e-3)
        for name, site in expected.sites.items()
    }
    assert_same(module.learner, by_hand(rule))


@pytest.mark.parametrize(
    "rule", [fb.DKP(), fb.rules.FDFA(), fb.DGL(hidden=4)], ids=lambda r: r.name
)
def test_a_resumed_run_is_the_same_bit_for_bit(rule: fb.Rule, tmp_path: Path) -> None:
    class Seeds(pl.Callback):
        """Phases draw noise from torch's generator, which Lightning does not save."""

        def on_train_batch_start(self, trainer: Any, *batch: Any) -> None:
            torch.manual_seed(trainer.global_step)

    whole, resumed, half = Module(rule), Module(rule), Module(rule)
    for p in resumed.parameters():
        p.data.normal_()
    callbacks = lambda: [FeedbackCallback(), Seeds()]  # noqa: E731
    fit(whole, size=4, max_epochs=2, callbacks=callbacks())
    fit(half, size=4, callbacks=callbacks()).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 4, tmp_path / "half.ckpt", max_epochs=2, callbacks=callbacks())
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_bf16_trains() -> None:
    module = Module(PUBLISHED).float()
    data = DataLoader(TensorDataset(X.float(), Y), batch_size=16)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed",
        enable_checkpointing=False,
        **options,
    )
    before = copy.deepcopy(module.learner.model.state_dict())
    trainer.fit(module, data)
    expected = by_hand(PUBLISHED)
    for name, p in module.learner.model.named_parameters():
        meant = expected[f"model.{name}"].float() - before[name]
        assert torch.norm(p - before[name] - meant) <= 0.05 * torch.norm(meant), name


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_averages_of_weights_hold_the_feedback(name: str) -> None:
    from lightning.pytorch import callbacks

    options = {"swa_lrs": 0.05, "swa_epoch_start": 1} if name.startswith("S") else {"decay": 0.5}
    module = Module(PUBLISHED)
    fit(module, size=4, max_epochs=4, callbacks=[getattr(callbacks, name)(**options)])
    trained = Module(PUBLISHED)
    fit(trained, size=4, max_epochs=4)
    for (name, p), other in zip(module.named_parameters(), trained.parameters(), strict=True):
        assert torch.isfinite(p).all()
        assert not torch.equal(p, other), name


@pytest.mark.parametrize(
    ("rule", "callback", "options", "message"),
    [
        (fb.rules.DKPPC(), {"loss": loss}, {"accumulate_grad_batches": 2}, "grad_batches=1"),
        (fb.rules.DKPPC(), {}, {}, "needs the loss"),
        (fb.DKP(), {"probe_every": 1}, {}, "needs the loss"),
        (fb.DKP(), {"feedback_every": 0}, {}, "feedback_every=0"),
    ],
)
def test_what_it_cannot_do_is_refused_at_once(
    rule: fb.Rule, callback: Any, options: Any, message: str
) -> None:
    module = Module(rule)
    with pytest.raises(FeedbackError, match=message):
        fit(module, callbacks=[FeedbackCallback(**callback)], **options)


def test_a_module_without_a_learner_is_refused() -> None:
    module = Module(fb.DFA())
    del module.learner
    module.learner = net()
    with pytest.raises(FeedbackError, match=r"self\.learner = fb\.attach"):
        fit(module, callbacks=[FeedbackCallback()])
