"""Backpropagation with activation checkpointing, on any model: the baseline of what saves memory by computing twice."""

from __future__ import annotations

import functools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from feedbackward.errors import AttachError


@dataclass(frozen=True)
class Run:
    """Stretches of modules that run one after the other, each the names of children of `parent`.

    chained: whether the parent is a Sequential, so that several stretches can be checkpointed as one.
    """

    parent: nn.Module
    stretches: list[list[str]]
    chained: bool


def add_checkpoints(model: nn.Module, group: int = 1) -> int:
    """Checkpoint a model's stretches, `group` of them together where they are chained; returns how many parts there are.

    A stretch is a block, as in `sites="blocks"`; in a Sequential of layers, a layer with weights and what follows it up to
    the next. Parameters stay the same tensors; their names change. Raises AttachError where there is no stretch.
    """
    runs = find_runs(model)
    if not runs:
        raise AttachError(
            f"{type(model).__name__} holds no block and no Sequential of layers, so there is nothing to checkpoint: put its "
            "parts into modules."
        )
    return sum(_wrap(run, group) for run in runs)


def groupings(model: nn.Module) -> list[int]:
    """Sensible values of `group` for a model: 1, 2, 4, ... below the longest chain's length."""
    longest = max((len(run.stretches) for run in find_runs(model) if run.chained), default=1)
    return [1, *(2**i for i in range(1, longest.bit_length()) if 2**i < longest)]


def find_runs(model: nn.Module) -> list[Run]:
    """All stretches of a model; what runs in sequence is taken apart, and a run within a run too."""
    if _is_sequential(model):
        return _of_sequential(model)
    runs = []
    for name, child in model.named_children():
        inner = [] if isinstance(model, nn.ModuleList) and not _is_run(child) else find_runs(child)
        if _count(inner) > 1:
            runs += inner
        elif _is_weighty(child) and next(child.children(), None) is not None:
            runs.append(Run(model, [[name]], chained=False))
    return runs


def _of_sequential(model: nn.Module) -> list[Run]:
    runs: list[Run] = []
    chain: list[list[str]] = []
    stretch: list[str] = []
    weighty = False
    for name, child in model.named_children():
        inner = find_runs(child) if _is_run(child) else []
        apart = _count(inner) > 1
        if stretch and weighty and (apart or _is_weighty(child)):  # a new stretch begins
            chain.append(stretch)
            stretch, weighty = [], False
        if apart:
            runs += [Run(model, chain, chained=True)] if chain else []
            runs += inner
            chain, stretch = [], []
        else:
            stretch.append(name)
            weighty = weighty or _is_weighty(child)
    chain += [stretch] if weighty else []
    return [*runs, Run(model, chain, chained=True)] if chain else runs


def _wrap(run: Run, group: int) -> int:
    if not run.chained:
        for (name,) in run.stretches:
            child: Any = run.parent.get_submodule(name)
            child.forward = functools.partial(checkpoint, child.forward, use_reentrant=False)
        return len(run.stretches)
    parts = range(0, len(run.stretches), group)
    for i in parts:
        names = [name for stretch in run.stretches[i : i + group] for name in stretch]
        modules = OrderedDict((name, run.parent.get_submodule(name)) for name in names)
        run.parent._modules[names[0]] = _Checkpointed(modules)
        for name in names[1:]:
            del run.parent._modules[name]
    return len(parts)


class _Checkpointed(nn.Sequential):
    """Keeps its input only, and runs again in the backward pass."""

    def forward(self, input: Any) -> Any:
        return checkpoint(super().forward, input, use_reentrant=False)


def _count(runs: list[Run]) -> int:
    return sum(len(run.stretches) for run in runs)


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _is_run(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) or _is_sequential(module)


def _is_weighty(module: nn.Module) -> bool:
    """Whether it holds the weights of a layer; those of a norm are vectors."""
    return any(p.dim() > 1 for p in module.parameters())
