"""Staleness: a schedule in which the gradients of each part of the network arrive some steps late."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from feedbackward.engine.weights import weight_names
from feedbackward.errors import AttachError, CheckpointError, FeedbackError

if TYPE_CHECKING:
    from feedbackward.learner import Learner

# who delays the gradients of a learner; an object that is gone delays nothing
_LIVE: WeakKeyDictionary[nn.Module, WeakSet[Delayed]] = WeakKeyDictionary()


def check_delayed(learner: nn.Module, label: str) -> None:
    """A rule that is a schedule as well is plain backprop without its `Delayed`.

    Raises FeedbackError where none was made, and warns where the one that was made is gone.
    """
    if _LIVE.get(learner):
        return
    fix = (
        "make `delayed = fb.Delayed(learner)`, keep it, and call `delayed.exchange()` before every "
        "optimizer step."
    )
    if learner not in _LIVE:
        raise FeedbackError(
            f"{label} is a schedule as well, without which it would be plain backprop: {fix}"
        )
    warnings.warn(
        f"the fb.Delayed of this learner is gone, so {label} trains by plain backprop now: {fix}",
        stacklevel=4,
    )


class Delayed:
    r"""Gradients that arrive late: a part that is k steps stale is updated at step t with its gradient of step t - k.

    .. math:: W_l^{t+1} = W_l^t - \eta\, \nabla_{W_l} \mathcal L\,(W^{t-k_l};\, x^{t-k_l})

    What a pipeline gives, where every stage works on another batch, on one device and step by step. It goes with any rule.

    The parts are the segments of `learner.plan.stages`, the lowest first and the head last. The feedback weights of a
    site, and its auxiliary network, belong to the part that they train; feedback that shares a weight's gradient is as late
    as the weight. In its first k steps a part has no gradient (None), and the optimizer leaves it as it is. A part that
    is not stale keeps its gradients untouched.

    Args:
        learner: as `attach` returned it.
        staleness: steps for all parts alike (1: pipelined DFA), or one number per part. Default: what the rule says
            (:class:`DSP`).
        steps: the most products in sequence that an update waits for, 0 for no bound. A part whose signal takes p of them is
            ceil(p / steps) - 1 steps late, besides `staleness`: a chain of any length then works like a pipeline in which every update
            takes `steps` products, each batch going on from where the last step left it.

    Call `exchange` once before every optimizer step, after the gradients of all accumulated batches and of
    `feedback_step` are there; clip afterwards. It holds k gradients of each part. Not with a GradScaler that changes its
    scale, unless gradients are unscaled before, and not with `step_in_backward`, which leaves no gradients to exchange.

    Raises AttachError where a parameter belongs to parts of different staleness, for their sum has no one age, and with
    `steps` where signals go on upwards, through the layers (IFA): it counts products along edges.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x = torch.randn(16, 4)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        >>> delayed = fb.Delayed(learner, 1)
        >>> learner(x).sum().backward()
        >>> delayed.exchange()  # puts the gradients of the step before in place of this step's
        >>> optimizer.step()
    """

    def __init__(
        self, learner: Learner, staleness: int | Sequence[int] | None = None, *, steps: int = 0
    ) -> None:
        parts = learner.plan.stages
        if staleness is None:
            staleness = learner.rule.delays(len(parts))
        delays = (staleness,) * len(parts) if isinstance(staleness, int) else tuple(staleness)
        if steps < 0:
            raise AttachError(f"steps must be >= 0 (0: no bound), got {steps}.")
        if len(delays) != len(parts) or any(delay < 0 for delay in delays):
            raise AttachError(
                f"staleness must be one number >= 0, or {len(parts)} of them, for the parts that end at "
                f"{', '.join(part.site for part in parts)}: got {staleness}."
            )
        self.delays = tuple(map(sum, zip(delays, _waits(learner, steps), strict=True)))
        self._learner = learner
        found = _ages(learner, self.delays)
        parameters = dict(learner.named_parameters())
        ages = {name: next(iter(parts)) for name, parts in found.items() if len(parts) == 1}
        # a parameter that is frozen now may train later, as late as its part
        self._parameters = {name: p for name, p in parameters.items() if ages.get(name, 0)}
        self._queues: dict[str, deque[Tensor | None]] = {
            name: deque([None] * ages[name]) for name in self._parameters
        }
        self._unclear = {n: (parameters[n], found[n]) for n in found if len(found[n]) > 1}
        for name, (p, ages_of) in self._unclear.items():
            if p.requires_grad:
                raise _no_one_age(name, ages_of)
        self._before: dict[str, Tensor] = {}
        _LIVE.setdefault(learner, WeakSet()).add(self)

    def exchange(self) -> None:
        """Put in place of each stale part's gradients those of so many steps ago, and keep the present ones.

        Raises AttachError where a parameter trains by now that belongs to parts of different staleness.
        """
        for name, (p, parts) in self._unclear.items():
            if p.grad is not None:
                raise _no_one_age(name, parts)
        for name, p in self._parameters.items():
            queue, grad = self._queues[name], p.grad
            # a view of somebody's buffer (DDP) will be written over
            queue.append(grad.clone() if grad is not None and grad._is_view() else grad)
            p.grad = queue.popleft()

    @contextmanager
    def predicted(self) -> Iterator[None]:
        r"""Weights where they will be when the gradients taken here arrive; on leaving they are what they were.

        .. math:: \hat W_l^t = W_l^t + k_l\,(W_l^t - W_l^{t-1})

        Linear weight prediction by the last step's movement, so it goes with any optimizer. Without it a late gradient belongs to
        weights that have moved on, which costs the more the more momentum there is.

        Enter it once for every optimizer step, around all accumulated batches and `feedback_step`. It holds a copy of each
        stale parameter, two while it is entered.

        Source: Kosson et al., "Pipelined Backpropagation at Scale", MLSys 2021 (there LWP in its form for weights).

        Example:
            >>> import torch
            >>> from torch import nn
            >>> import feedbackward as fb
            >>> x = torch.randn(16, 4)
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            >>> learner = fb.attach(model, fb.DFA(), example=x)
            >>> optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
            >>> delayed = fb.Delayed(learner, 1)
            >>> with delayed.predicted():
            ...     learner(x).sum().backward()
            >>> delayed.exchange()
            >>> optimizer.step()
        """
        now = {n: p.detach().clone() for n, p in self._parameters.items() if p.requires_grad}
        with torch.no_grad():
            for name in now.keys() & self._before.keys():
                p, before = self._parameters[name], self._before[name]
                p.add_(p - before, alpha=len(self._queues[name]))
        self._before = now
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weights in now.items():
                    self._parameters[name].copy_(weights)

    def state_dict(self) -> dict[str, Any]:
        """The gradients that have yet to arrive, by parameter, the oldest first; of `predicted` the weights before the last step."""
        return {
            "delays": list(self.delays),
            "waiting": {name: list(queue) for name, queue in self._queues.items()},
            "before": self._before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises CheckpointError where it belongs to another network or staleness."""
        waiting = state["waiting"]
        if list(state["delays"]) != list(self.delays) or waiting.keys() != self._queues.keys():
            raise CheckpointError(
                f"the waiting gradients belong to another network or staleness: they are for delays {list(state['delays'])} and "
                f"{len(waiting)} parameters, here it is {list(self.delays)} and {len(self._queues)}."
            )
        before, self._before = state.get("before", {}), {}
        for name, p in self._parameters.items():
            kept = [*waiting[name], before.get(name)]
            if any(tensor is not None and tensor.shape != p.shape for tensor in kept):
                raise CheckpointError(
                    f"what is kept for late gradients of {name!r} is not of its shape {list(p.shape)}."
                )
            *grads, last = (None if t is None else t.to(p.device, p.dtype, copy=True) for t in kept)
            self._queues[name] = deque(grads)
            if last is not None:
                self._before[name] = last


def _waits(learner: Learner, steps: int) -> tuple[int, ...]:
    """How many steps of at most so many products the signal of each part takes besides the first."""
    if not steps:
        return (0,) * len(learner.plan.stages)
    return tuple(max(0, -(-p // steps) - 1) for p in products(learner))


def products(learner: Learner) -> tuple[int, ...]:
    """How many products in sequence it takes from the output's error to the signal of each part, the lowest first and the head last.

    Of backprop, one for every part above. Where several sites lie above a relay the deepest of them counts.
    Raises AttachError where signals go on upwards, through layers, or pass some branches only.
    """
    graph, parts = learner.graph, len(learner.plan.stages)
    if graph.branches:
        raise AttachError(
            f"products in sequence are counted part by part, and {learner.rule.label} sends errors along paths "
            "that pass some branches: leave steps at 0, or give `staleness` a number per part."
        )
    if graph.upward:
        raise AttachError(
            f"products in sequence are counted along feedback edges, and what {learner.rule.label} sends to a site goes on upwards "
            "through the layers: leave steps at 0, or give `staleness` a number per part."
        )
    if not graph.sites:
        return tuple(reversed(range(parts)))
    sites: dict[int, int] = {}
    sources: dict[str, int] = {}
    for met in reversed(learner.plan.order):
        deepest = max(sites.values(), default=0)
        if isinstance(met, str):
            sources[met] = deepest
        else:
            fed = [sources[e.source.name] for e in graph.edges if e.site == graph.sites[met]]
            sites[met] = 1 + max(fed) if fed else 0
    return (*(sites[i] for i in range(len(graph.sites))), 0)


def _ages(learner: Learner, delays: Sequence[int]) -> dict[str, dict[int, str]]:
    """The delays of every parameter of the learner that is in some part, each with a part of that delay."""
    found: dict[str, dict[int, str]] = {}
    for part, delay in zip(learner.whole_plan.stages, delays, strict=True):
        for name in part.parameters:
            found.setdefault(f"model.{name}", {})[delay] = part.site
    places = {site.points: i for i, site in enumerate(learner.graph.sites)}
    auxiliary = dict(learner.feedback.named_parameters())
    for edge in learner.graph.edges:
        i = places[edge.site.points]
        own = found.get(f"model.{edge.shares}", {delays[i]: edge.site.name})
        for name in weight_names(edge):
            found.setdefault(f"feedback.{name}", {}).update(own)
    for end in learner.graph.local:
        i = places[end.site.points]
        for name in auxiliary:
            if name.startswith(f"{end.key}."):
                found.setdefault(f"feedback.{name}", {})[delays[i]] = end.site.name
    return found


def _no_one_age(name: str, parts: Mapping[int, str]) -> AttachError:
    where = " and ".join(f"{site!r} ({delay} steps)" for delay, site in parts.items())
    return AttachError(
        f"{name} is in several parts of different staleness, {where}, and its gradient is their sum: give these parts the "
        "same staleness, or choose sites that do not overlap."
    )
