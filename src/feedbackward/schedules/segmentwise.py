"""Replay with kept segment inputs: each segment runs by itself, from the last to the first.

A forward pass without gradients keeps the activity of every site. After that, each segment is a forward pass of the model
that skips every module that had ended before the segment began. Kept activities replace the sites, and the pass ends at the
segment's own site. A segment needs another one only for the error of a relay, which comes from above.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from feedbackward.activity import Source
from feedbackward.engine.attached import Attached
from feedbackward.engine.hooks import Director, PassOverError
from feedbackward.engine.plan import parameters_behind
from feedbackward.engine.target import Target
from feedbackward.errors import AttachError, SiteError
from feedbackward.model.attributes import PLAIN
from feedbackward.model.example import copied, run
from feedbackward.model.state import RandomState, forward_of, preserved
from feedbackward.model.values import by_place, tensors_in
from feedbackward.schedules.passes import Deliver, Fingerprint, LossFn, finish
from feedbackward.schedules.preparation import Preparation


@dataclass
class _Call:
    """A module call of the first pass: when it ended, inside which other call, and what replaces its output later."""

    name: str
    parent: _Call | None
    # of the tensors that the call gets, by their places
    versions: dict[str, int]
    end: int = -1
    output: Any = None
    left_out: bool = False


@dataclass(frozen=True)
class _Site:
    """A placeholder in a call's output for the activity of the site with this number."""

    index: int


@dataclass(frozen=True)
class _Given:
    """A placeholder in a call's output for what the call gets at this place, which it hands on as it is."""

    place: str


@dataclass
class _Kept:
    """What the first pass left: the calls, and for each site its activity, its random state and its time."""

    beginning: RandomState
    activities: dict[int, Tensor] = field(default_factory=dict)
    random: dict[int, RandomState] = field(default_factory=dict)
    clock: dict[int, int] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    # of the sources and of the output's other tensors
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)


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
        kept = _keep(attached, inputs, loss_fn, director)
        check = not prepared.separable
        loss, after = _head(attached, inputs, loss_fn, director, kept, order, deliver, check)
        for place in reversed(range(len(order))):
            _segment(attached, inputs, director, kept, order, place, deliver, check)
    after.restore()
    prepared.separable = True
    return loss


def _keep(attached: Attached, inputs: Any, loss_fn: LossFn, director: Director) -> _Kept:
    kept, clock = _Kept(RandomState(attached.model)), iter(range(1 << 62))

    def at_site(index: int, h: Tensor) -> Tensor:
        kept.clock[index] = next(clock)
        kept.activities[index] = h
        kept.random[index] = RandomState(attached.model)
        return h

    def at_source(source: Source, tensor: Tensor) -> Tensor:
        kept.fingerprints[source.name] = Fingerprint.of(tensor)
        return tensor

    recorded = _calls(attached.model, kept, clock)
    directed = director.directing(at_site, at_source)
    with preserved(attached.model), torch.no_grad(), recorded, directed:
        output = run(attached.model, copied(inputs))
        kept.fingerprints |= _prints(output) or {"loss": Fingerprint.of(loss_fn(output))}
    torch.clear_autocast_cache()  # of weights that were cast without gradients
    return kept


@contextmanager
def _calls(model: nn.Module, kept: _Kept, clock: Iterator[int]) -> Iterator[None]:
    """Record the calls of the model's parts, outermost first."""
    running: list[_Call] = []

    def enter(name: str, args: Any, kwargs: Any) -> None:
        given, _ = by_place(args, kwargs)
        versions = {p: t._version for p, t in given.items() if isinstance(t, Tensor)}
        call = _Call(name, running[-1] if running else None, versions)
        kept.calls.append(call)
        running.append(call)

    def leave(args: Any, kwargs: Any, output: Any) -> None:
        call = running.pop()
        call.end = next(clock)
        # a packed sequence is no tuple that could be made anew of stand-ins
        if isinstance(output, PackedSequence):
            return
        leaves = tree_leaves(output, is_leaf=lambda part: isinstance(part, PackedSequence))
        if all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
            # what the call changes in place is made by it
            given = {
                id(t): place
                for place, t in by_place(args, kwargs)[0].items()
                if isinstance(t, Tensor) and t._version == call.versions.get(place)
            }
            call.output = tree_map(
                lambda t: _skeleton(t, kept, given) if isinstance(t, Tensor) else t, output
            )

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                pre = module.register_forward_pre_hook(
                    lambda m, a, k, name=name: enter(name, a, k), with_kwargs=True
                )
                stack.callback(pre.remove)
                # prepended, so that the call has ended before its output is handled as a site
                post = module.register_forward_hook(
                    lambda m, a, k, out: leave(a, k, out), prepend=True, with_kwargs=True
                )
                stack.callback(post.remove)
        yield


def _skeleton(t: Tensor, kept: _Kept, given: dict[int, str]) -> Any:
    """What replaces a tensor of a call's output until the call is skipped. Masks and indices are kept."""
    for index in reversed(kept.activities):
        if kept.activities[index] is t:
            return _Site(index)
    if id(t) in given:
        return _Given(given[id(t)])
    return t.to("meta") if t.is_floating_point() or t.is_complex() else t


def _prints(output: Any) -> dict[str, Fingerprint]:
    """The fingerprints of the numbers in an output."""
    tensors = [t for t in tensors_in(output) if t.is_floating_point()]
    return {f"output {i}": Fingerprint.of(t) for i, t in enumerate(tensors)}


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
    loss = loss_fn(output)
    # of an output that nothing is seen of (a closure) the loss is what tells
    for name, now in (_prints(output) or {"loss": Fingerprint.of(loss)}).items():
        _refuse_another(name, now.like(kept.fingerprints.get(name)))
    if check:
        _refuse_interleaved(attached, [*tensors_in(output), loss], attached.plan.head)
    return finish(loss), RandomState(attached.model)


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
    same = torch.allclose(h.detach(), kept.activities[index], rtol=1e-3, atol=1e-4, equal_nan=True)
    _refuse_another(attached.graph.sites[index].name, same)
    deliver.at_site(index, h, h._version)


def _refuse_another(name: str, same: bool) -> None:
    """Refuse a segment that did not do what it did in the first pass."""
    if not same:
        raise SiteError(
            f"the repeated segment gave another {name!r} than the first pass, so the gradients of this step mix two networks: zero "
            "them. Randomness must come from torch's generators, and what crosses the cuts must be sites; or use "
            "keep_inputs=False."
        )


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
        _refuse_another(
            source.name, Fingerprint.of(tensor).like(kept.fingerprints.get(source.name))
        )
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
    def fill(t: Any, given: dict[str, Any]) -> Any:
        if isinstance(t, _Site):
            return kept.activities[t.index]
        if isinstance(t, _Given):
            return given[t.place]
        lost = isinstance(t, Tensor) and t.is_meta
        return torch.zeros(t.shape, dtype=t.dtype, device=device) if lost else t

    return lambda *args, **kwargs: tree_map(
        functools.partial(fill, given=by_place(args, kwargs)[0]), skeleton
    )


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
