"""Whether a model still has the parts that it had when it was attached: adapters, pruning, fusion and the like change them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from feedbackward.activity import LayerInput, PreActivation
from feedbackward.engine.checks import check_graph
from feedbackward.errors import AttachError
from feedbackward.graph import Graph
from feedbackward.model.trace import PARAMETRIC
from feedbackward.rule import Rule


class Structure:
    """The parts of a model, the classes of these, and the names of their parameters.

    `unchanged` is asked in every pass, so it compares and does no more; `judge` says what a change means.
    """

    def __init__(self, model: nn.Module, rule: Rule, graph: Graph) -> None:
        self.rule, self.graph = rule, graph
        ends = (*graph.sites, *graph.sources)
        self._hooked = {point.module for end in ends for point in end.points}
        self._chain = any(isinstance(site, LayerInput) for site in graph.sites)
        # their activation is kept apart from the model
        self._lifted = any(isinstance(site, PreActivation) for site in graph.sites)
        self._note(model)

    def unchanged(self) -> bool:
        """Whether every part is where it was, of the class and with the parameters that it had."""
        if torch.compiler.is_compiling():
            return True
        tensors: list[Tensor | None] = []
        for m, kind, parts, names, own in self._parts:
            space = m.__dict__
            if (
                type(m) is not kind
                or m._modules != parts
                or [*m._parameters] != names
                or space.get("forward") is not own
            ):
                return False
            tensors += m._parameters.values()
        # the count matters only where there are others: weights may have been tied
        ids = [*map(id, tensors)]
        return ids == self._ids or len({*ids}) == self._tensors

    def judge(self, model: nn.Module) -> None:
        """Take a changed model as it is, if feedback still stands for what it did.

        Raises AttachError, naming the module, where it does not.
        """
        now = dict(model.named_modules())
        for (name, module), (_, kind, _, _, own) in zip(
            self._named.items(), self._parts, strict=True
        ):
            new = now.get(name)
            if new is module:
                # a chain feeds a layer as if nothing but its weight were applied
                other = type(new).forward is not kind.forward or vars(new).get("forward") is not own
                if self._chain and name in self._hooked and other:
                    raise _refused(name, f"({kind.__name__}) got another forward")
                continue
            parts = {n for n in self._hooked if n == name or n.startswith(f"{name}.")}
            if parts or self._lifted or _lost(module, new) or self._carries(module, new):
                raise _changed(name, module, new)
        for name in now.keys() - self._named.keys():
            if self._carries(None, now[name]):
                raise _changed(name, None, now[name])
        try:
            check_graph(model, self.rule, self.graph)
        except AttachError as error:
            raise AttachError(f"the model was changed after it was attached: {error}") from error
        self._note(model)

    def _carries(self, old: nn.Module | None, new: nn.Module | None) -> bool:
        """Whether the error of a chain would travel through weights that were not there: a chain feeds every layer."""
        if (
            not self._chain
            or new is None
            or (isinstance(new, PARAMETRIC) and type(new) is type(old))
        ):
            return False
        return any(p.dim() > 1 for p in new.parameters())

    def _note(self, model: nn.Module) -> None:
        self._named = dict(model.named_modules())
        self._parts = [
            (m, type(m), dict(m._modules), [*m._parameters], vars(m).get("forward"))
            for m in self._named.values()
        ]
        self._ids = [id(p) for m, *_ in self._parts for p in m._parameters.values()]
        # how many parameters there are, those that are tied counted once
        self._tensors = len({*self._ids})


def _lost(old: nn.Module, new: nn.Module | None) -> bool:
    """Whether layers with weights gave way to something that passes no gradient on (quantised layers)."""
    layers = any(isinstance(m, PARAMETRIC) for m in old.modules())
    return layers and (new is None or not any(p.is_floating_point() for p in new.parameters()))


def _changed(name: str, old: nn.Module | None, new: nn.Module | None) -> AttachError:
    was = type(old).__name__
    what = (
        f"was added ({type(new).__name__})"
        if old is None
        else f"({was}) was removed"
        if new is None
        else f"({was}) was replaced by {'another' if type(new) is type(old) else 'a'} {type(new).__name__}"
    )
    return _refused(name, what)


def _refused(name: str, what: str) -> AttachError:
    return AttachError(
        f"module {name!r} {what} after the model was attached, so feedback no longer stands for the model: attach again "
        "(`attach(learner.detach(), ...)`)."
    )
