"""Replay with kept segment inputs: each segment runs by itself, from the last to the first.

A forward pass without gradients keeps the activity of every site. After that, each segment is a forward pass of the model
that skips every module that had ended before the segment began. Kept activities replace the sites, and the pass ends at the
segment's own site. A segment needs another one only for the error of a relay, which comes from above.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from feedbackward.engine.attached import Attached
from feedbackward.engine.hooks import Director, PassOverError
from feedbackward.engine.plan import parameters_behind
from feedbackward.engine.target import Target
from feedbackward.errors import AttachError, SiteError
from feedbackward.model.attributes import PLAIN
from feedbackward.model.example import copied, run
from feedbackward.model.state import RandomState, forward_of, preserved
from feedbackward.model.values import tensors_in
from feedbackward.schedules.passes import Deliver, LossFn, finish
from feedbackward.schedules.preparation import Preparation


@dataclass
class _Call:
    """A module call of the first pass: when it ended, inside which other call, and what replaces its output later."""

    name: str
    parent: _Call | None
    end: int = -1
    output: Any = None
    left_out: bool = False


@dataclass(frozen=True)
class _Site:
    """A placeholder in a call's output for the activity of the site with this number."""

    index: int


@dataclass
class _Kept:
    """What the first pass left: the calls, and for each site its activity, its random state and its time."""

    beginning: RandomState
    activities: dict[int, Tensor] = field(default_factory=dict)
    random: dict[int, RandomState] = field(default_factory=dict)
    clock: dict[int, int] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)


def replay_kept(
    attached: Attached, inputs: Any, loss_fn: LossFn, target: Target | None, prepared: Preparation
) -> Tensor:
    """Forward and backward of a batch; returns the loss."""
    if prepared.changed:
        raise AttachError(
            f"the forward pass changes {prepared.changed!r} of the model, so a step whose segments run "
            "one by one would change it more than once. Use keep_inputs=False."
        )
    director = Director(attached.graph.sites, attached.graph.sources)
    order = [index for index in attached.plan.order if isinstance(index, int)]
    deliver = Deliver(attached.cuts, target, {})
    with ExitStack() as stack:
        for handle in director.install(attached.model):
            stack.callback(handle.remove)
        kept = _keep(attached, inputs, director)
        check = not prepared.separable
        loss, after = _head(attached, inputs, loss_fn, director, kept, order, deliver, check)
        for place in reversed(range(len(order))):
            _segment(attached, inputs, director, kept, order, place, deliver, check)
    after.restore()
    prepared.separable = True
    return loss


def _keep(attached: Attached, inputs: Any, director: Director) -> _Kept:
    kept, clock = _Kept(RandomState(attached.model)), iter(range(1 << 62))

    def at_site(index: int, h: Tensor) -> Tensor:
        kept.clock[index] = next(clock)
        kept.activities[index] = h
        kept.random[index] = RandomState(attached.model)
        return h

    recorded = _calls(attached.model, kept, clock)
    directed = director.directing(at_site, lambda source, tensor: tensor)
    with preserved(attached.model), torch.no_grad(), recorded, directed:
        run(attached.model, copied(inputs))
    torch.clear_autocast_cache()  # of weights that were cast without gradients
    return kept


@contextmanager
def _calls(model: nn.Module, kept: _Kept, clock: Iterator[int]) -> Iterator[None]:
    """Record the calls of the model's parts, outermost first."""
    running: list[_Call] = []

    def enter(name: str) -> None:
        call = _Call(name, running[-1] if running else None)
        kept.calls.append(call)
        running.append(call)

    def leave(output: Any) -> None:
        call = running.pop()
        call.end = next(clock)
        leaves = tree_leaves(output)
        if all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
            call.output = tree_map(
                lambda t: _skeleton(t, kept) if isinstance(t, Tensor) else t, output
            )

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                pre = module.register_forward_pre_hook(lambda m, a, name=name: enter(name))
                stack.callback(pre.remove)
                # prepended, so that the call has ended before its output is handled as a site
                post = module.register_forward_hook(lambda m, a, out: leave(out), prepend=True)
                stack.callback(post.remove)
        yield


def _skeleton(t: Tensor, kept: _Kept) -> Any:
    """What replaces a tensor of a call's output until the call is skipped."""
    for index in reversed(kept.activities):
        if kept.activities[index] is t:
            return _Site(index)
    return t.to("meta")


def _head(
    attached: Attached,
    inputs: Any,
    loss_fn: LossFn,
    director: Director,
    kept: _Kept,
    order: Sequence[int],
    deliver: Deliver,
    check: bool,
) -> tuple[Tensor, RandomState]:
    with _from(attached, director, kept, order, len(order), deliver):
        output = run(attached.model, copied(inputs))
    if check:
        _refuse_interleaved(attached, tensors_in(output), attached.plan.head)
    loss = finish(loss_fn(output))
    return loss, RandomState(attached.model)


def _segment(
    attached: Attached,
    inputs: Any,
    director: Director,
    kept: _Kept,
    order: Sequence[int],
    place: int,
    deliver: Deliver,
    check: bool,
) -> None:
    index, found = order[place], list[Tensor]()
    with _from(attached, director, kept, order, place, deliver, found.append):
        run(attached.model, copied(inputs))
    (h,) = found
    found.clear()
    if check:
        _refuse_interleaved(attached, [h], attached.plan.segments[index])
    if not torch.allclose(h.detach(), kept.activities[index], rtol=1e-3, atol=1e-4, equal_nan=True):
        raise SiteError(
            f"the repeated segment gave another {attached.graph.sites[index].name!r} than the first pass, so the gradients of this "
            "step mix two networks: zero them. Randomness must come from torch's generators, and what crosses the cuts must be sites; "
            "or use keep_inputs=False."
        )
    deliver.at_site(index, h, h._version)


@contextmanager
def _from(
    attached: Attached,
    director: Director,
    kept: _Kept,
    order: Sequence[int],
    place: int,
    deliver: Deliver,
    end: Callable[[Tensor], None] | None = None,
) -> Iterator[None]:
    """Let the model's next pass begin at the site before `place` in `order`, and end at the site at `place`, if any."""
    lower = set(order[:place])
    start = order[place - 1] if place else None

    def at_site(index: int, h: Tensor) -> Tensor:
        if index not in lower:
            assert end is not None
            end(h)
            raise PassOverError
        if index == start:
            kept.random[index].restore()
            torch.set_grad_enabled(True)
        return kept.activities[index]

    def at_source(source: Any, tensor: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return tensor
        tensor = (
            tensor.view_as(tensor)
            if tensor.requires_grad
            else tensor.detach().requires_grad_().clone()
        )
        tensor.register_hook(lambda d: deliver.errors.__setitem__(source.name, d))
        return tensor

    if start is None:
        kept.beginning.restore()
    left_out = _left_out(attached, kept, start)
    with (
        torch.set_grad_enabled(start is None),
        left_out,
        director.directing(at_site, at_source, whole=False),
    ):
        yield


@contextmanager
def _left_out(attached: Attached, kept: _Kept, start: int | None) -> Iterator[None]:
    """Skip the modules whose only call had ended when the first pass reached the site `start`.

    They return the kept activity if they returned one, and zeros otherwise, which only other skipped modules read.
    """
    if start is None:
        yield
        return
    model, now = attached.model, kept.clock[start]
    counts = Counter(call.name for call in kept.calls)
    chosen = list[_Call]()
    for call in kept.calls:
        call.left_out = call.parent is not None and call.parent.left_out
        if call.left_out or call.end > now or call.output is None or counts[call.name] > 1:
            continue
        call.left_out = True
        chosen.append(call)
    modules = [model.get_submodule(call.name) for call in chosen]
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for module, call in zip(modules, chosen, strict=True):
            stack.enter_context(forward_of(module, _stand_in(call.output, kept, device)))
        yield


def _stand_in(skeleton: Any, kept: _Kept, device: torch.device) -> Callable[..., Any]:
    def fill(t: Any) -> Any:
        if isinstance(t, _Site):
            return kept.activities[t.index]
        return torch.zeros(t.shape, dtype=t.dtype, device=device) if isinstance(t, Tensor) else t

    return lambda *args, **kwargs: tree_map(fill, skeleton)


def _refuse_interleaved(attached: Attached, ends: Sequence[Any], segment: Any) -> None:
    """Refuse a segment that does not train all the parameters that the plan says."""
    names = {id(p): name for name, p in attached.model.named_parameters()}
    tensors = [t for t in ends if isinstance(t, Tensor) and t.requires_grad]
    trainable = {name for name, p in attached.model.named_parameters() if p.requires_grad}
    missing = (set(segment.parameters) & trainable) - set(parameters_behind(tensors, names))
    if missing:
        raise AttachError(
            f"the segment of {segment.site!r} cannot run by itself: {min(missing)!r} runs before the segment below has ended "
            "(branches that interleave). Use keep_inputs=False, which repeats the pass as a whole."
        )
