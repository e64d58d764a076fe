"""The gradients of a cut network from its cut points alone: the user's forward with the sites' tensors detached, then the
rule's formula, written naively. Nothing of the engine is used, only where it says that it cuts, and its feedback weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

import feedbackward as fb
from feedbackward.activity import HookPoint

Grads = dict[str, Tensor | None]


class CutPass:
    """One forward pass of a plain model in which points of it are replaced: `at` maps a point to what is done there."""

    def __init__(
        self, model: nn.Module, at: Mapping[HookPoint, Callable[[Tensor], Tensor]]
    ) -> None:
        self.calls: dict[str, int] = {}
        self.handles = []
        for name in {point.module for point in at}:
            module = model.get_submodule(name)
            points = {p: f for p, f in at.items() if p.module == name}
            self.handles.append(
                module.register_forward_pre_hook(self._before(name, points), with_kwargs=True)
            )
            self.handles.append(module.register_forward_hook(self._after(points)))

    def _before(self, name: str, points: Mapping[HookPoint, Callable[[Tensor], Tensor]]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            call = self.calls.get(name, 0)
            self.calls[name] = call + 1
            for point, change in points.items():
                if point.kind == "input" and point.call == call:
                    paths, spec = tree_flatten_with_path((args, kwargs))
                    (old,) = [leaf for path, leaf in paths if keystr(path) == point.place]
                    new = change(old)
                    args, kwargs = tree_unflatten([new if t is old else t for _, t in paths], spec)
            return args, kwargs

        return hook

    def _after(self, points: Mapping[HookPoint, Callable[[Tensor], Tensor]]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            for point, change in points.items():
                if point.kind == "output":
                    leaves, spec = tree_flatten(output)
                    old = leaves[point.leaf or 0]
                    new = change(old)
                    output = tree_unflatten([new if t is old else t for t in leaves], spec)
            return output

        return hook


def cut_gradients(
    model: nn.Module,
    learner: fb.Learner,
    run: Callable[[nn.Module], Tensor],
    y: Tensor,
) -> tuple[Tensor, Grads, Grads]:
    """The output, and the gradients of the model's parameters and of the feedback, under DFA, DKP, DRTP or DGL.

    `model`: a plain copy of the learner's. `run`: runs it and gives the tensor that the loss is of.
    """
    sites, (source,) = learner.graph.sites, learner.graph.sources
    kept: dict[str, Tensor] = {}
    cuts: dict[str, Tensor] = {}
    ends: list[Tensor] = []

    def cut(name: str) -> Callable[[Tensor], Tensor]:
        def change(h: Tensor) -> Tensor:
            if name not in kept:
                kept[name], cuts[name] = h, h.detach().clone()
            assert kept[name] is h
            return cuts[name]

        return change

    def end(s: Tensor) -> Tensor:
        ends.extend([s, s.detach().clone().requires_grad_()])
        return ends[1]

    at: dict[HookPoint, Callable[[Tensor], Tensor]] = {
        p: cut(s.name) for s in sites for p in s.points
    }
    CutPass(model, {**at, source.points[0]: end})
    output = run(model)
    loss = F.cross_entropy(output.flatten(0, -2), y.flatten())
    (d,) = torch.autograd.grad(loss, ends[1], retain_graph=True)
    outputs, errors = [loss], [torch.ones_like(loss)]
    if ends[0].requires_grad:
        outputs, errors = [*outputs, ends[0]], [*errors, d]
    auxiliary: dict[str, Tensor] = {}
    feedback: Grads = {}
    for edge in learner.graph.edges:
        h = kept[edge.site.name]
        (B,) = (w.detach() for w in learner.weights_of(edge))
        lead = edge.leading
        error = d.reshape(d.shape[:lead].numel(), -1)
        if isinstance(learner.rule, fb.DRTP):
            error = F.one_hot(y, d.shape[-1]).to(d).reshape(error.shape) / len(error)
        if h.requires_grad:
            outputs.append(h)
            errors.append((error @ _sent(learner.rule, B.flatten(1))).reshape(h.shape))
        if isinstance(learner.rule, fb.DKP):
            feedback[edge.key] = None
            if h.requires_grad:
                seen = h.detach().flatten(0, lead - 1)
                feedback[edge.key] = _dkp(learner.rule, edge.site, error, seen).reshape(B.shape)
    for local in learner.graph.local:
        h = kept[local.site.name]
        if not h.requires_grad:
            continue
        part = copy.deepcopy(learner.feedback.get_submodule(local.key))
        auxiliary |= {f"{local.key}.{name}": p for name, p in part.named_parameters()}
        outputs.append(F.cross_entropy(part(h).flatten(0, -2), y.flatten()))
        errors.append(torch.ones_like(outputs[-1]))
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = [*own.values(), *auxiliary.values()]
    grads = torch.autograd.grad(outputs, wanted, errors, allow_unused=True)
    feedback |= dict(zip(auxiliary, grads[len(own) :], strict=True))
    return output.detach(), dict(zip(own, grads, strict=False)), feedback


def _dkp(rule: fb.DKP, site: fb.Site, error: Tensor, h: Tensor) -> Tensor:
    """e^T h C^-1, with the covariance C of a map's channels or of the features of tokens."""
    centred = h - h.mean(0) if len(h) > 1 else h
    h = centred if rule.center else h
    if rule.whiten and (site.tokens or h.dim() > 2):
        axis = h.dim() - 1 if site.tokens else 1
        features = centred.movedim(axis, 0).flatten(1)
        C = features @ features.t() / features.shape[1]
        C = C + rule.ridge * C.trace() / len(C) * torch.eye(len(C)).to(C)
        h = torch.tensordot(torch.linalg.inv(C), h, ([1], [axis])).movedim(0, axis)
    return error.t() @ h.flatten(1)


def _sent(rule: fb.Rule, B: Tensor) -> Tensor:
    """What an error is multiplied by: `B`, or the orthogonal matrix next to it, which ten steps of X (3 - X^T X) / 2 come to."""
    if not (isinstance(rule, fb.DKP) and rule.orthogonal):
        return B
    X = B / torch.linalg.matrix_norm(B)
    for _ in range(10):
        X = 1.5 * X - 0.5 * X @ X.t() @ X
    return rule.strength * X


def chain_gradients(
    model: nn.Module,
    learner: fb.Learner,
    run: Callable[[nn.Module], Tensor],
    y: Tensor,
) -> tuple[Tensor, Grads, Grads]:
    """The same under Kolen-Pollack: in the backward of each fed layer `B` stands for `W`, and gets the gradient of `W`."""
    fed = {edge.site.weight.rpartition(".")[0]: edge for edge in learner.graph.edges}
    for name, edge in fed.items():
        module = model.get_submodule(name)
        weight = edge.site.weight.rpartition(".")[2]
        module.forward = _fed_back(module, weight, learner.feedback_of(edge).detach())
    output = run(model)
    loss = F.cross_entropy(output.flatten(0, -2), y.flatten())
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    found = dict(zip(own, grads, strict=True))
    return output.detach(), found, {edge.key: found.get(edge.site.weight) for edge in fed.values()}


def _fed_back(module: nn.Module, weight: str, B: Tensor) -> Callable[[Tensor], Tensor]:
    plain = type(module).forward

    def forward(input: Tensor) -> Tensor:
        made = plain(module, input.detach())
        stand_in = copy.copy(module)
        del stand_in.__dict__["forward"]
        fixed = {name: p.detach() for name, p in module.named_parameters()}
        through = functional_call(stand_in, {**fixed, weight: B}, (input,))
        return made + (through - through.detach())

    return forward
