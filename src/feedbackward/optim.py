"""For the optimizer: parameter groups, updates inside the backward pass, weights of fixed norm, and Muon."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from feedbackward.learner import Learner
    from feedbackward.parallel import Pipeline


def renormalize_weights(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer
) -> RemovableHandle:
    r"""After every step of the optimizer, give each matrix or kernel among `parameters` back the norm that it has now.

    .. math:: W \leftarrow W\,\|W_0\|_F / \|W\|_F

    It serves chains whose feedback does not grow with the weights (FA, sign-concordant feedback; Moskovitz et al. 2019). The
    weights still train, and keep their identity for the optimizer. Parameters of one dimension (biases, norms) and weights
    that are zero are left alone. When you resume a run, call it before or after you load the weights: all have the same
    norm. Remove the returned handle to end it.

    parameters: usually `learner.model.parameters()`.
    optimizer: the one that updates them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.FA(), example=x)
        >>> optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        >>> handle = fb.renormalize_weights(model.parameters(), optimizer)
        >>> before = model[0].weight.norm().item()
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> optimizer.step()
        >>> abs(model[0].weight.norm().item() - before) < 1e-5
        True
    """
    kept: list[tuple[Tensor, Tensor]] = [
        (p, p.detach().norm()) for p in parameters if p.dim() > 1 and p.requires_grad
    ]

    @torch.no_grad()
    def restore(*step: Any) -> None:
        for W, norm in kept:
            now = W.norm()
            W.mul_(torch.where(now > 0, norm / now, 1.0))

    return optimizer.register_step_post_hook(restore)


def param_groups(
    learner: Learner | Pipeline,
    model: dict[str, Any] | None = None,
    feedback: dict[str, Any] | None = None,
    no_decay: bool | Callable[[str, nn.Parameter], bool] = False,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: one for the model's parameters and one for the learned feedback weights.

    Each group has a `name`. For a rule without learned feedback there is no group `"feedback"`. To clip `B` apart from the
    weights, clip `learner.model.parameters()` and `learner.feedback.parameters()` one by one.

    model, feedback: options of the groups, for example `model={"lr": 0.1}` and `feedback={"lr": 0.01, "weight_decay": 0.0}`.
    no_decay: with True, biases and the parameters of norms are in a group `"model without decay"`, whose `weight_decay` is 0,
        as Hugging Face's Trainer has it. Or a function `(name, parameter) -> bool` that chooses what does not decay, by the
        model's own names.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x = torch.randn(16, 4)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DKP(), example=x)
        >>> groups = fb.param_groups(learner, model={"lr": 0.1}, feedback={"lr": 0.01})
        >>> [group["lr"] for group in torch.optim.SGD(groups).param_groups]
        [0.1, 0.01]
    """
    named = list(learner.named_parameters())
    learned = [p for name, p in named if name.startswith("feedback.")]
    own = [(n.removeprefix("model."), p) for n, p in named if not n.startswith("feedback.")]
    spared = no_decay if callable(no_decay) else _spared(learner) if no_decay else _nothing
    decayed = [p for name, p in own if not spared(name, p)]
    rest = [p for name, p in own if spared(name, p)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "name": "model", **(model or {})},
        {"params": rest, "name": "model without decay", **(model or {}), "weight_decay": 0.0},
        {"params": learned, "name": "feedback", **(feedback or {})},
    ]
    return [group for i, group in enumerate(groups) if i == 0 or group["params"]]


def _nothing(name: str, parameter: nn.Parameter) -> bool:
    return False


def _spared(learner: nn.Module) -> Callable[[str, nn.Parameter], bool]:
    """Biases, and what belongs to a norm of whatever class (`LlamaRMSNorm`)."""
    norms = {
        id(p)
        for m in learner.modules()
        if "norm" in type(m).__name__.lower()
        for p in m.parameters(recurse=False)
    }
    return lambda name, p: "bias" in name.rpartition(".")[2] or id(p) in norms


def step_in_backward(
    parameters: Iterable[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> list[RemovableHandle]:
    """Update each parameter as soon as its gradient is there, and drop the gradient, so that they never exist all at once.

    parameters: usually `learner.parameters()`.
    make: builds the optimizer of one parameter, for example `lambda p: torch.optim.SGD(p, lr=0.1)`.

    With the schedules `eager` and `replay`, a segment is updated before the next one runs. Do not call `zero_grad` or `step`
    elsewhere. Gradients cannot be accumulated, or clipped together. A parameter in several segments (tied weights, `Shared`
    feedback) is updated once for each of them. Remove the returned handles to end it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> handles = fb.step_in_backward(learner.parameters(), lambda p: torch.optim.SGD(p, lr=0.1))
        >>> nn.functional.cross_entropy(learner(x), y).backward()  # this trains
        >>> all(p.grad is None for p in learner.parameters())
        True
    """

    def hook(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def update(parameter: Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return update

    return [
        p.register_post_accumulate_grad_hook(hook(make([p]))) for p in parameters if p.requires_grad
    ]


class Muon(torch.optim.Optimizer):
    r"""Muon for matrices and kernels, AdamW for all else (Jordan et al. 2024; Liu et al. 2025).

    A kernel counts as the matrix `[outputs, all else]`. With the momentum :math:`M`,

    .. math:: M \leftarrow \mu M + G, \qquad
        W \leftarrow (1 - \eta\lambda) W - 0.2\,\eta \sqrt{\max(m, n)}\; U V^\top,

    where :math:`U S V^\top` is the singular value decomposition of :math:`G + \mu M` (of :math:`M` without `nesterov`), whose
    singular values five steps of Newton and Schulz bring near one. All directions of a matrix so learn alike, also where
    errors of low rank, such as those of feedback alignment, point in few of them. The updates are as large as AdamW's, so one
    rate suits both. `torch.optim.Muon` takes two-dimensional parameters alone.

    params: parameters or groups. A group with `"matrices": False` is AdamW's as a whole: embeddings of many rows, for example.
    lr, weight_decay: of both. momentum, nesterov: of matrices. betas, eps: of all else.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> from feedbackward.optim import Muon
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DKP(), example=x)
        >>> optimizer = Muon(learner.parameters(), lr=0.002)
        >>> nn.functional.cross_entropy(learner(x), y).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not (0 <= momentum < 1 and lr >= 0):
            raise ValueError(
                f"lr must be at least 0 and momentum in [0, 1), not {lr} and {momentum}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults | {"betas": betas, "eps": eps, "matrices": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update. `closure` computes the loss again, as in every optimizer of PyTorch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix = group["matrices"] and p.dim() > 1
                    update = self._muon if matrix else self._adam
                    p.sub_(update(p.grad, self.state[p], group))
        return loss

    @staticmethod
    def _muon(G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        mu = group["momentum"]
        M = _moment(state, "momentum_buffer", G).mul_(mu).add_(G)
        matrix = (G + mu * M if group["nesterov"] else M).flatten(1)
        size = 0.2 * group["lr"] * math.sqrt(max(matrix.shape))
        return size * orthogonalized(matrix).view_as(G)

    @staticmethod
    def _adam(G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        first, second = group["betas"]
        state["step"] = state.get("step", 0) + 1
        mean = _moment(state, "exp_avg", G).lerp_(G, 1 - first)
        square = _moment(state, "exp_avg_sq", G).mul_(second).addcmul_(G, G, value=1 - second)
        root = (square / (1 - second ** state["step"])).sqrt() + group["eps"]
        return group["lr"] / (1 - first ** state["step"]) * mean / root


def _moment(state: dict[str, Any], key: str, G: Tensor) -> Tensor:
    """A running mean of the state, which begins at zero."""
    if key not in state:
        state[key] = torch.zeros_like(G)
    found: Tensor = state[key]
    return found


def orthogonalized(G: Tensor) -> Tensor:
    r"""A matrix with the singular vectors of `G` and singular values near one: five steps of Newton and Schulz (Jordan et al. 2024).

    .. math:: X \leftarrow a X + b\, X X^\top X + c\, (X X^\top)^2 X
    """
    X = G.mT if G.shape[0] > G.shape[1] else G
    X = X / X.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = X @ X.mT
        X = 3.4445 * X + (2.0315 * gram @ gram - 4.7750 * gram) @ X
    return X.mT if G.shape[0] > G.shape[1] else X
