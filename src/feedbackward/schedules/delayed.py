"""Delayed gradients: those of each part of the network arrive some steps late."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from feedbackward.engine.attached import Attached, AttachedModule
from feedbackward.engine.weights import weight_names
from feedbackward.errors import AttachError, CheckpointError
from feedbackward.schedules.dsp import DELAYED, own_delays


class Delayed:
    r"""Gradients that arrive late: a part with a delay of k steps is updated at step t with its gradient of step t - k.

    .. math:: W_l^{t+1} = W_l^t - \eta\, \nabla_{W_l} \mathcal L\,(W^{t-k_l};\, x^{t-k_l})

    A pipeline whose stages work on different batches gives such gradients. This class gives them on one device, step by
    step, with any rule.

    The parts are the segments of `learner.plan.stages`, the lowest first and the head last. The feedback weights of a site
    and its auxiliary network belong to the part that they train. Feedback that shares the gradient of a weight is as late as
    the weight. In its first k steps a part has no gradient (None), and the optimizer leaves it alone. A part without a
    delay keeps its gradients.

    Args:
        learner: as `attach` returned it.
        staleness: the delay in steps: one number for all parts (1 is pipelined DFA), or one number per part. Default: what
            the rule says, see :class:`DSP`.
        steps: the most products in sequence that an update waits for; 0 for no bound. A part whose signal takes p products
            is ceil(p / steps) - 1 steps later than `staleness` says. A chain of any length then works like a pipeline in which every
            update takes `steps` products.

    Call `exchange` once before every optimizer step, when the gradients of all accumulated batches and of `feedback_step`
    are there, and clip gradients afterwards. It keeps k gradients of each part. A GradScaler that changes its scale needs
    `unscale_` before. `step_in_backward` leaves no gradients to exchange.

    Raises AttachError if a parameter belongs to parts with different delays, because the sum of their gradients has no one
    age. With `steps` it also refuses signals that go upwards through the layers (IFA), because it counts products along
    edges.

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
        self,
        learner: AttachedModule,
        staleness: int | Sequence[int] | None = None,
        *,
        steps: int = 0,
    ) -> None:
        attached = learner.attached
        parts = attached.plan.stages
        if staleness is None:
            staleness = own_delays(attached.rule, len(parts))
        delays = (staleness,) * len(parts) if isinstance(staleness, int) else tuple(staleness)
        if steps < 0:
            raise AttachError(f"steps must be >= 0 (0: no bound), got {steps}.")
        if len(delays) != len(parts) or any(delay < 0 for delay in delays):
            raise AttachError(
                f"staleness must be one number >= 0, or {len(parts)} of them, for the parts that end at "
                f"{', '.join(part.site for part in parts)}: got {staleness}."
            )
        self.delays = tuple(map(sum, zip(delays, _waits(attached, steps), strict=True)))
        self._learner = learner
        found = _ages(attached, self.delays)
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
        DELAYED.setdefault(learner, WeakSet()).add(self)

    def exchange(self) -> None:
        """Replace the gradients of each part by those of k steps ago, and keep the present ones for later.

        Raises AttachError if a parameter that belongs to parts with different delays trains by now.
        """
        for name, (p, parts) in self._unclear.items():
            if p.grad is not None:
                raise _no_one_age(name, parts)
        for name, p in self._parameters.items():
            queue, grad = self._queues[name], p.grad
            # DDP will overwrite a gradient that is a view of its buffer
            queue.append(grad.clone() if grad is not None and grad._is_view() else grad)
            p.grad = queue.popleft()

    @contextmanager
    def predicted(self) -> Iterator[None]:
        r"""Put the weights where they will be when the gradients taken here arrive, and restore them on leaving.

        .. math:: \hat W_l^t = W_l^t + k_l\,(W_l^t - W_l^{t-1})

        This is linear weight prediction from the movement of the last step, so it works with any optimizer. Without it, the
        weights move on before their gradient arrives, which costs more with more momentum.

        Enter it once for every optimizer step, around all accumulated batches and `feedback_step`. It keeps a copy of each
        delayed parameter, and two copies inside the context.

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
        """The gradients that have not arrived yet, by parameter, the oldest first, and the weights that `predicted` needs."""
        return {
            "delays": list(self.delays),
            "waiting": {name: list(queue) for name, queue in self._queues.items()},
            "before": self._before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises CheckpointError if it belongs to another network or other delays."""
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


def _waits(attached: Attached, steps: int) -> tuple[int, ...]:
    """How many steps of at most `steps` products the signal of each part takes after the first step."""
    if not steps:
        return (0,) * len(attached.plan.stages)
    return tuple(max(0, -(-p // steps) - 1) for p in products(attached))


def products(attached: Attached) -> tuple[int, ...]:
    """How many products in sequence it takes from the output's error to the signal of each part, the lowest first and the head last.

    Of backprop, one for every part above. Where several sites lie above a relay the deepest of them counts.
    Raises AttachError where signals go on upwards, through layers, or pass some branches only.
    """
    graph, parts = attached.graph, len(attached.plan.stages)
    if graph.branches:
        raise AttachError(
            f"products in sequence are counted part by part, and {attached.rule.label} sends errors along paths "
            "that pass some branches: leave steps at 0, or give `staleness` a number per part."
        )
    if graph.upward:
        raise AttachError(
            f"products in sequence are counted along feedback edges, and what {attached.rule.label} sends to a site goes on upwards "
            "through the layers: leave steps at 0, or give `staleness` a number per part."
        )
    if not graph.sites:
        return tuple(reversed(range(parts)))
    sites: dict[int, int] = {}
    sources: dict[str, int] = {}
    for met in reversed(attached.plan.order):
        deepest = max(sites.values(), default=0)
        if isinstance(met, str):
            sources[met] = deepest
        else:
            fed = [sources[e.source.name] for e in graph.edges if e.site == graph.sites[met]]
            sites[met] = 1 + max(fed) if fed else 0
    return (*(sites[i] for i in range(len(graph.sites))), 0)


def _ages(attached: Attached, delays: Sequence[int]) -> dict[str, dict[int, str]]:
    """For every parameter that is in a part: its delays, each with the name of a part that has it."""
    found: dict[str, dict[int, str]] = {}
    for part, delay in zip(attached.whole_plan.stages, delays, strict=True):
        for name in part.parameters:
            found.setdefault(f"model.{name}", {})[delay] = part.site
    places = {site.points: i for i, site in enumerate(attached.graph.sites)}
    auxiliary = dict(attached.feedback.named_parameters())
    for edge in attached.graph.edges:
        i = places[edge.site.points]
        own = found.get(f"model.{edge.shares}", {delays[i]: edge.site.name})
        for name in weight_names(edge):
            found.setdefault(f"feedback.{name}", {}).update(own)
    for end in attached.graph.local:
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
