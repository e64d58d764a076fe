"""A model that trains by its rule whoever calls it: hooks on its root begin and end every pass under cuts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.hooks import RemovableHandle

from feedbackward.engine.attached import Attached
from feedbackward.engine.outside import average_in_backward, several_processes
from feedbackward.engine.target import Target
from feedbackward.engine.transparent import FirstHook, Inert
from feedbackward.errors import AttachError
from feedbackward.model.example import Given


def refuse_other_learners(model: nn.Module, in_place: bool) -> None:
    """Refuse a model that trains in place already, and to train one in place that has a learner.

    Learners that are called by themselves may share a model: only the hooks of the one that is called do something.
    A model that trains in place would cut the passes of the others too.
    """
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(hook, _Hook):
                raise AttachError(
                    f"{type(module).__name__} trains in place by another learner already: call `detach()` of that learner first."
                )
            if in_place and isinstance(hook, Inert):
                raise AttachError(
                    f"{type(model).__name__} has a learner already, whose passes would be cut twice if the model trained in place: "
                    "call `detach()` of that learner first."
                )


class InPlace:
    """The hooks on the root of an attached model.

    `begin()` says what a pass is: None for a plain one, else a tuple of the targets that it was given (or None).
    """

    def __init__(
        self, attached: Attached, begin: Callable[[], tuple[Target | None] | None]
    ) -> None:
        self.attached, self.begin = attached, begin
        self._open: ExitStack | None = None

    def install(self) -> list[RemovableHandle]:
        """Put the hooks on the model, the first and the last of all."""
        model = self.attached.model
        return [
            model.register_forward_pre_hook(_Before(self.before), prepend=True, with_kwargs=True),
            model.register_forward_hook(_Hook(self.after), always_call=True),
        ]

    def before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin a pass under cuts, unless the pass is one of ours or a plain one."""
        if self.attached.own_passes or self.attached.cuts.tape is not None:
            return
        given = self.begin()
        if given is None:
            return
        # whoever reduces the model's gradients knows of no feedback
        if several_processes():
            average_in_backward(self.attached.feedback.parameters())
        self._follow_zero_grad()
        self.attached.begin_pass(Given(args, kwargs), given[0])
        self._open = ExitStack()
        tape = self._open.enter_context(self.attached.cuts.recording(given[0]))
        tied = self.attached.cuts.tied()
        if tied:
            self._open.enter_context(_reparametrize_module(model, tied))
        self._tape = tape

    def _follow_zero_grad(self) -> None:
        """Clear the feedback's gradients where the model's are cleared: `model.zero_grad()` knows of no feedback."""
        if all(p.grad is None for p in self.attached.model.parameters()):
            self.attached.feedback.zero_grad()

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """End the pass. `output` is None where the model's forward raised."""
        if self._open is None:
            return
        opened, self._open = self._open, None
        self._tape.over = self._tape.over or output is None
        opened.close()


class _Hook(Inert):
    def __init__(self, act: Callable[..., Any]) -> None:
        self.act = act

    def __call__(self, *given: Any) -> Any:
        return self.act(*given)


class _Before(_Hook, FirstHook):
    pass
