"""How near a rule comes to backprop: angles of teaching signals, gradients and feedback weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from feedbackward.engine.hooks import Observer
from feedbackward.engine.html import html_table
from feedbackward.errors import FeedbackError
from feedbackward.graph import Edge
from feedbackward.learner import Learner
from feedbackward.model.example import copied, run
from feedbackward.model.state import preserved


@dataclass(frozen=True)
class ParameterAlignment:
    """A rule's gradient of one tensor beside backprop's.

    cosine, angle (degrees): between the two; nan where the rule gives none or backprop's is zero.
    norm_ratio: |rule| / |backprop|.
    sign_agreement: share of equal signs where backprop's is not zero.
    bp_norm: |backprop|; a cosine beside a norm at the numerical floor means nothing.
    """

    cosine: float
    angle: float
    norm_ratio: float
    sign_agreement: float
    bp_norm: float


@dataclass(frozen=True)
class SiteAlignment(ParameterAlignment):
    """A rule's teaching signal at one site beside backprop's; cosine is the mean over the samples of the batch.

    jacobian_cosine: between the feedback `B_l` and the batch-mean Jacobian `dsource/dh_l`, as [C, n] matrices.
    readout: mean over samples of `cos(a_L, h_l B_l^T)`, the measure of the DKP authors' code.
    Both are None unless asked for (see `probe`), and for edges that keep token dimensions.
    """

    jacobian_cosine: float | None = None
    readout: float | None = None


@dataclass(frozen=True)
class Probe:
    """The alignment of every site and of every parameter tensor on one batch. `str()` of it is a table.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> probe = fb.probe(learner, lambda output: nn.functional.cross_entropy(output, y), x)
        >>> list(probe.sites), list(probe.parameters)[:2]
        (['1'], ['0.weight', '0.bias'])
        >>> 0 <= probe.sites["1"].angle <= 180
        True
    """

    sites: Mapping[str, SiteAlignment]
    parameters: Mapping[str, ParameterAlignment]

    def as_dict(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Plain numbers for JSON; what is undefined is None."""

        def plain(rows: Mapping[str, ParameterAlignment]) -> dict[str, dict[str, float | None]]:
            return {
                name: {
                    k: v if v is not None and math.isfinite(v) else None
                    for k, v in asdict(row).items()
                }
                for name, row in rows.items()
            }

        return {"sites": plain(self.sites), "parameters": plain(self.parameters)}

    def __str__(self) -> str:
        width = max(len(name) for name in [*self.sites, *self.parameters, "parameter"])
        lines = []
        for heads, rows in self._tables():
            lines += [
                row[0].ljust(width)
                + "".join(c.rjust(w) for c, w in zip(row[1:], _WIDTHS, strict=False))
                for row in (heads, *rows)
            ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return "".join(html_table(heads, rows) for heads, rows in self._tables())

    def _tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Heads and cells, of the sites and of the parameters."""
        more = ["B vs J", "readout"] if any(_more(a) for a in self.sites.values()) else []
        heads = ["cosine", "angle", "norm ratio", "signs", "|BP|"]
        sites = [[name, *_cells(a), *_more(a)] for name, a in self.sites.items()]
        parameters = [[name, *_cells(a)] for name, a in self.parameters.items()]
        return [(["site", *heads, *more], sites), (["parameter", *heads], parameters)]


_WIDTHS = (8, 8, 12, 8, 11, 10, 10)


def _cells(a: ParameterAlignment) -> list[str]:
    ratio = f"{a.norm_ratio:.3g}"
    return [
        f"{a.cosine:.3f}",
        f"{a.angle:.1f}",
        ratio,
        f"{a.sign_agreement:.2f}",
        f"{a.bp_norm:.2e}",
    ]


def _more(a: SiteAlignment) -> list[str]:
    """What is known of a learned feedback. The readout alone stands under its own head."""
    if a.readout is None:
        return []
    return ["" if a.jacobian_cosine is None else f"{a.jacobian_cosine:.3f}", f"{a.readout:.3f}"]


def probe(
    learner: Learner,
    loss_fn: Callable[[Any], Tensor],
    batch: Any,
    *,
    jacobian: bool | int | None = None,
) -> Probe:
    """Compare the rule's teaching signals and gradients with backprop's on one batch, in the learner's current mode.

    Nothing is changed: no `.grad`, buffer, random state, mode or weight. Both passes draw the same dropout masks.

    Args:
        learner: as `attach` returned it.
        loss_fn: `loss_fn(output) -> scalar`, for example `lambda out: F.cross_entropy(out, y)`.
        batch: the model's inputs (tensor, tuple or dict).
        jacobian: compare the feedback with the batch-mean Jacobian, at the cost of C backward passes, and measure its
            readout alignment. A number compares so many of the C rows, evenly spaced, at the cost of as many passes.
            Default: where the rule learns its feedback, with the Jacobian only if C <= 256.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.BP(), example=x)
        >>> result = fb.probe(learner, lambda output: F.cross_entropy(output, y), x)
        >>> round(result.parameters["0.weight"].cosine, 4)
        1.0
    """
    if not isinstance(learner, Learner):
        raise FeedbackError(
            f"probe needs the learner that `attach` returned, not a {type(learner).__name__}."
        )
    many = learner.graph.repeated
    if many:
        raise FeedbackError(
            "the probe compares the signals of sites that are called once in a pass, and "
            f"{many[0].name!r} is called many times. Compare the gradients of parameters with those within learner.exact()."
        )
    params = {name: p for name, p in learner.model.named_parameters() if p.requires_grad}
    rule_signals, rule_grads, _ = _gradients(learner, loss_fn, batch, params, exact=False)
    bp_signals, bp_grads, activities = _gradients(learner, loss_fn, batch, params, exact=True)
    weights = _compare_feedback(learner, batch, jacobian, activities)
    sites = {
        name: SiteAlignment(
            *_site_measures(rule_signals.get(name), bp), *weights.get(name, (None, None))
        )
        for name, bp in bp_signals.items()
    }
    parameters = {
        name: ParameterAlignment(*_measures(_flat(rule_grads[name]), _flat(bp)))
        for name, bp in bp_grads.items()
        if bp is not None
    }
    return Probe(sites, parameters)


def _gradients(
    learner: Learner,
    loss_fn: Callable[[Any], Tensor],
    batch: Any,
    params: Mapping[str, Tensor],
    exact: bool,
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None], dict[str, Tensor]]:
    """Signals per site, gradients per parameter, and activities per site, of one forward and backward pass."""
    with preserved(learner), _observed(learner) as tape:
        if exact:
            with learner.exact():
                output = run(learner, copied(batch))
        else:
            output = run(learner, copied(batch))
        loss = loss_fn(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise FeedbackError(
                f"loss_fn must return one number, got {tuple(loss.shape) if isinstance(loss, Tensor) else loss!r}."
            )
        hs = {
            site.name: h
            for site, h in zip(learner.sites, tape.h, strict=True)
            if h is not None and h.requires_grad
        }
        grads = torch.autograd.grad(loss, [*hs.values(), *params.values()], allow_unused=True)
    signals: dict[str, Tensor | None] = dict(zip(hs, grads[: len(hs)], strict=True))
    return signals, dict(zip(params, grads[len(hs) :], strict=True)), hs


class _observed:  # noqa: N801  (a context manager reads as a verb)
    """Observe the learner's sites and source in forward passes within the context."""

    def __init__(self, learner: Learner) -> None:
        self.model = learner.model
        self.observer = Observer(learner.sites, (learner.source,))

    def __enter__(self) -> Any:
        self.grad = torch.enable_grad()
        self.grad.__enter__()
        # behind hooks of the user that replace an activity; those of the learner come last
        self.handles = self.observer.install(self.model)
        self.recording = self.observer.recording()
        return self.recording.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.recording.__exit__(*exc)
        for handle in self.handles:
            handle.remove()
        self.grad.__exit__(*exc)


def _compare_feedback(
    learner: Learner, batch: Any, jacobian: bool | int | None, activities: Mapping[str, Tensor]
) -> dict[str, tuple[float | None, float | None]]:
    """Per site: the cosine of B with the mean Jacobian, and the readout alignment."""
    wanted = learner.rule.learned if jacobian is None else jacobian
    edges = [
        e
        for e in learner.graph.edges
        if e.leading == 1
        and not e.repeats
        and e.source == learner.source
        and e.site.name in activities
        and e.operator.linear
    ]
    if not wanted or not edges:
        return {}
    with preserved(learner), _observed(learner) as tape, learner.exact():
        run(learner, copied(batch))
        hs = {site.name: h for site, h in zip(learner.sites, tape.h, strict=True)}
        source = _rows(tape.sources[learner.source.name])
        units = _units(source.shape[1], jacobian)
        means = _mean_jacobian(source, units, [hs[e.site.name] for e in edges]) if units else None
    found: dict[str, tuple[float | None, float | None]] = {}
    for i, edge in enumerate(edges):
        # the whole matrix B: [C, n] may be too large to make
        sent = _sender(learner, edge)
        h = hs[edge.site.name].detach().double()
        error = h.new_zeros(len(h), edge.source_size, requires_grad=True)
        with torch.enable_grad():
            (readout,) = torch.autograd.grad(sent(error), error, h)
        cosine = None
        if means is not None:
            with torch.no_grad():
                cosine = _measures(sent(_unit_errors(units, error)), means[i])[0]
        found[edge.site.name] = (cosine, _cosines(readout, source.double()).nanmean().item())
    return found


def _sender(learner: Learner, edge: Edge) -> Callable[[Tensor], Tensor]:
    """What makes the signals `[M, *site]` of errors `[M, C]`: their product with B, whatever its operator."""
    held = learner.weights_of(edge)
    if edge.forward_weight:
        held = (*held, learner.model.get_parameter(edge.forward_weight))
    weights = tuple(w.detach().double() if w.is_floating_point() else w for w in held)
    return lambda error: edge.operator.send(
        weights, error.reshape(-1, *edge.source_shape), edge.site_shape
    )


def _unit_errors(units: list[int], like: Tensor) -> Tensor:
    """The errors of these source units, one row for each."""
    errors = like.new_zeros(len(units), like.shape[1])
    errors[range(len(units)), units] = 1
    return errors


def _units(count: int, jacobian: bool | int | None) -> list[int]:
    """Which of the source's units the Jacobian is taken of; none where it is not affordable."""
    if jacobian is None:
        return list(range(count)) if count <= 256 else []
    wanted = count if jacobian is True else min(count, jacobian)
    return [i * count // wanted for i in range(wanted)]


def _mean_jacobian(source: Tensor, units: list[int], hs: list[Tensor]) -> list[Tensor]:
    """E[dsource/dh] over the batch, one [len(units), n] matrix per activity."""
    rows: list[list[Tensor]] = [[] for _ in hs]
    for c in units:
        grads = torch.autograd.grad(
            source[:, c].sum(), hs, retain_graph=True, materialize_grads=True
        )
        for i, g in enumerate(grads):
            rows[i].append(_rows(g).double().mean(0))
    return [torch.stack(r) for r in rows]


def _rows(t: Tensor) -> Tensor:
    """One row per sample; also of a tensor [N]."""
    return t.reshape(len(t), -1)


def _flat(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.detach().double().flatten()


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine per row; 0 where only `a` vanishes, nan where `b` (the reference) does."""
    norms = a.norm(dim=1) * b.norm(dim=1)
    cosine = (a * b).sum(1) / norms.clamp_min(1e-300)
    return torch.where(b.norm(dim=1) > 0, cosine, torch.nan)


def _measures(rule: Tensor | None, bp: Tensor | None) -> tuple[float, float, float, float, float]:
    """cosine, angle, norm ratio, sign agreement and backprop's norm of two tensors taken whole."""
    if bp is None:
        return (math.nan,) * 5
    rows = (rule.reshape(1, -1) if rule is not None else None, bp.reshape(1, -1))
    return _row_measures(*rows)


def _site_measures(
    rule: Tensor | None, bp: Tensor | None
) -> tuple[float, float, float, float, float]:
    if bp is None:
        return (math.nan,) * 5
    return _row_measures(_rows(rule).double() if rule is not None else None, _rows(bp).double())


def _row_measures(rule: Tensor | None, bp: Tensor) -> tuple[float, float, float, float, float]:
    norm = bp.norm().item()
    if rule is None:
        return math.nan, math.nan, 0.0, math.nan, norm
    cosine = _cosines(rule, bp).nanmean().item()
    angle = (
        math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) if math.isfinite(cosine) else math.nan
    )
    ratio = rule.norm().item() / norm if norm else math.nan
    there = bp != 0
    signs = (rule.sign() == bp.sign())[there].double().mean().item() if there.any() else math.nan
    return cosine, angle, ratio, signs, norm
