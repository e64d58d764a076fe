r"""Whether row i of a source is made from row i of each site that it feeds, as feedback takes for granted.

Two backward passes through a recorded forward pass tell it for all rows at once. The first one sends the same random error
from every row of the source, the second one sends row i's times a power of two, its code. In a network that keeps rows apart,
the second gradient of a site's row is then the first one times the code of the source's row that it leads to.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from feedbackward.activity import Activity, LayerInput, Site, Source
from feedbackward.engine.relabelled import moves_along
from feedbackward.errors import AttachError
from feedbackward.graph import Edge, Graph, Local
from feedbackward.model.autograd_graph import leading_to, outputs_behind
from feedbackward.model.trace import Trace, trace
from feedbackward.operators.base import widened

Activities = Mapping[Activity, Tensor]
# sites where other rows than the own one count most, with what is wrong unless the model moves no rows
Doubts = dict[Site, AttachError]

# a gradient is a row's own if it differs from the expected one by no more than this part: codes differ by a factor of two
_ROOM = 0.05
# the rows whose errors are sent alone where rows are mixed; another row may be ahead of the own one by the first factor in
# half of them (the hubs of a graph) but not by the second in all, unless the inputs in another order show the rows to be in place
_PROBES, _AHEAD, _ALWAYS = 4, 2.0, 1.25
# another row is ahead by more than this where the own one counts for nothing
_NOTHING = 1e6
# how many training passes are looked at before a network in which nothing can be seen is taken as it is
_TRIES = 8
# into how many sums the gradient of a row is put
_SUMS = 64
# autograd's nodes of what picks rows by number
_PICKING = ("Index", "Gather", "Scatter", "Sort", "MaskedSelect", "MaskedScatter", "Take")


class Rows:
    """The check of a graph's rows, at `attach` and, where the example could not show it, in the first training passes.

    Nothing shows in an example of one row, or where the gradient is zero (a head that begins at zero). Where rows are picked
    by number, another batch may be picked in another order.
    """

    def __init__(self, graph: Graph) -> None:
        ends: list[Edge | Local] = [*graph.edges, *graph.local]
        ends = [end for end in ends if not _of_one_layer(end)]
        self._fed: dict[Source, list[Site]] = {}
        # how many leading dimensions an edge keeps: more than one where tokens are paired as well
        self._kept: dict[tuple[Source, Site], int] = {}
        for end in ends:
            self._fed.setdefault(end.source, []).append(end.site)
            self._kept[end.source, end.site] = end.leading if isinstance(end, Edge) else 1
        self._tries = _TRIES if ends else 0

    def tensors(self, recorded: Trace) -> Activities:
        """Of a recorded pass what the check needs: the rest need not be kept for it."""
        ends = [*self._fed, *(site for sites in self._fed.values() for site in sites)]
        return {end: recorded.tensor_at(end.points[0]) for end in ends}

    def see(self, tensors: Activities, model: nn.Module, inputs: Any, again: bool = False) -> None:
        """Look at a pass. Raises AttachError where rows do not belong together."""
        seen = []
        for source, sites in self._fed.items():
            told, doubts = self._see(tensors, source, sites)
            seen.append(told)
            ends = [source, *doubts]
            if doubts and not moves_along(model, inputs, ends, len(tensors[source])):
                raise next(iter(doubts.values()))
        if all(seen) and (again or not any(_picks(tensors[source]) for source in self._fed)):
            self._tries = 0

    @property
    def to_see(self) -> bool:
        """Whether there is something that no pass has shown yet."""
        return self._tries > 0

    def see_again(self, model: nn.Module, inputs: Any) -> None:
        """Before a training pass: look at its inputs, unless all has been seen."""
        if not self._tries or torch.compiler.is_compiling() or not _has_values(inputs):
            return
        self._tries -= 1
        try:
            tensors = self.tensors(trace(model, inputs))
        except AttachError:
            # inputs that can be read once only, or that the model refuses: its own error will say so
            return
        self.see(tensors, model, inputs, again=True)

    def _see(
        self, tensors: Activities, source: Source, sites: Sequence[Site]
    ) -> tuple[bool, Doubts]:
        """Whether the pass shows that the rows of the source are those of these sites; and where there are doubts."""
        end = tensors[source]
        pairs = [(site, tensors[site]) for site in dict.fromkeys(sites)]
        pairs = [(site, h) for site, h in pairs if h.requires_grad and len(h) == len(end)]
        if not end.requires_grad or not pairs:
            return True, {}
        if len(end) < 2 or end.is_meta:
            return False, {}
        try:
            look = _Look(end, [h for _, h in pairs])
        except RuntimeError:
            # what cannot be differentiated says so in training
            return True, {}
        seen = [look.judge(source, site, i) for i, (site, _) in enumerate(pairs)]
        # below a site whose tokens are mixed all are mixed
        for i, (site, h) in reversed(list(enumerate(pairs))):
            kept = self._kept[source, site]
            paired = kept > 1 and h.shape[:kept] == end.shape[:kept]
            if paired and not look.keeps_tokens(source, site, i, kept):
                break
        return all(seen), look.doubts


def _has_values(inputs: Any) -> bool:
    """Whether there is something to see: tensors on the meta device, and fake ones, have shapes only."""
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    return all(t.untyped_storage().device.type != "meta" for t in tensors)


def _picks(end: Tensor) -> bool:
    """Whether rows may be picked by number on the way to the source."""
    return any(node.name().startswith(_PICKING) for node, _ in outputs_behind(end))


class _Look:
    """The gradients of sites for errors of a source whose rows are told apart."""

    def __init__(self, end: Tensor, activities: Sequence[Tensor]) -> None:
        self.end, self.activities = end, activities
        draw = torch.Generator().manual_seed(0)
        error = torch.randn((1, *end.shape[1:]), generator=draw, device="cpu")
        self.error = error.to(end.device, end.dtype)
        self.code = _codes(len(end), draw).to(end.device, end.dtype)
        # the nodes between the source and other sites: their sites' gradients only pass by
        self.between = leading_to(end, activities)
        self.doubts: Doubts = {}
        self.plain = self._sketches(torch.ones_like(self.code))
        self.coded = self._sketches(self.code)

    def judge(self, source: Source, site: Site, i: int) -> bool:
        """Whether row i of the site is row i of the source; False where the gradient does not show it.

        Raises AttachError where the rows are others, or mixed so that another one counts more.
        """
        plain, coded = self.plain[i], self.coded[i]
        told = plain.flatten(1).abs().amax(1) > 0
        if not told.any() or not (plain.isfinite().all() and coded.isfinite().all()):
            return False
        if _coded(plain, coded, self.code, 0):
            return True
        (plain,) = self._gradients(torch.ones_like(self.code), 0, [i])
        (coded,) = self._gradients(self.code, 0, [i])
        told = plain.flatten(1).abs().amax(1) > 0
        for dim in range(1, plain.dim()):
            if plain.shape[dim] == len(self.code) and _coded(plain, coded, self.code, dim):
                raise _refused(
                    source, site, f"the batch is dimension {dim} of the site's {list(plain.shape)}"
                )
        row = _permuted(plain, coded, told, self.code)
        if row is not None:
            raise _refused(source, site, f"row {row} of the site leads to another row")
        for dim in range(1, self.end.dim()):
            if self.end.shape[dim] == len(self.code):
                along = self._gradients(self.code, dim, [i])[0]
                if _coded(plain, along, self.code, dim=0):
                    raise _refused(
                        source,
                        site,
                        f"the batch is dimension {dim} of the source's {list(self.end.shape)}",
                    )
        self._weigh_rows(source, site, i)
        return True

    def keeps_tokens(self, source: Source, site: Site, i: int, kept: int) -> bool:
        """Whether each token of the site is seen to be made into that token of the source; False where tokens are mixed.

        Raises AttachError where tokens are in another order.
        """
        rows = self.end.shape[:kept]
        code = _codes(rows.numel(), torch.Generator().manual_seed(1)).to(self.code)
        sent = code.view(*rows, *[1] * (self.end.dim() - kept))
        plain, coded = (
            _sketch(self._gradient_of(factors, [i])[0].flatten(0, kept - 1))
            for factors in (torch.ones_like(sent), sent)
        )
        told = plain.abs().amax(1) > 0
        if not told.any() or not (plain.isfinite().all() and coded.isfinite().all()):
            return False
        moved = _permuted(plain, coded, told, code)
        if moved is not None:
            place = moved % rows[1:].numel()
            why = f"token {place} of the site leads to another token, reversed or shifted"
            raise _refused(source, site, why)
        return _coded(plain, coded, code, 0)

    def _sketches(self, factors: Tensor) -> list[Tensor]:
        """Of every site's gradient a few random sums for each row, for an error times these factors of its rows.

        No gradient is kept, so that the check takes little more memory than the pass that it looks at.
        """
        made: list[Tensor] = [torch.zeros(len(h), 1, device=h.device) for h in self.activities]

        def keep(i: int, gradient: Tensor) -> None:
            made[i] = _sketch(gradient)

        handles = [
            h.register_hook(functools.partial(keep, i))
            for i, h in enumerate(self.activities)
            if h.grad_fn in self.between
        ]
        ends = [i for i, h in enumerate(self.activities) if h.grad_fn not in self.between]
        try:
            for i, gradient in zip(ends, self._gradients(factors, 0, ends), strict=True):
                keep(i, gradient)
        finally:
            for handle in handles:
                handle.remove()
        return made

    def _gradients(self, factors: Tensor, dim: int, only: Sequence[int]) -> list[Tensor]:
        """Of these sites, for the random error times these factors along a dimension of the source."""
        shape = [1] * self.end.dim()
        shape[dim] = len(factors)
        return self._gradient_of(factors.view(shape), only)

    def _gradient_of(self, factors: Tensor, only: Sequence[int]) -> list[Tensor]:
        """Of these sites, for the random error times factors that are broadcast to it."""
        wanted = [self.activities[i] for i in only]
        # of a number: for other outputs autograd imports a library that takes more than a second
        total = (self.end * (self.error * factors)).sum()
        return list(torch.autograd.grad(total, wanted, retain_graph=True, materialize_grads=True))

    def _weigh_rows(self, source: Source, site: Site, i: int) -> None:
        """Rows are mixed (attention over the batch, nodes of a graph): the own one is among the first, or there are doubts.

        Raises AttachError where the own row counts for nothing.
        """
        count = len(self.code)
        probes = range(0, count, max(1, count // _PROBES))
        ahead = []
        for row in probes:
            alone = torch.zeros_like(self.code)
            alone[row] = 1
            norms = self._gradients(alone, 0, [i])[0].flatten(1).double().norm(dim=1)
            own = max(norms[row].item(), 1e-300)
            ahead.append((norms.max().item() / own, int(norms.argmax()), row))
        far = sum(factor > _AHEAD for factor, _, _ in ahead)
        factor, other, row = sorted(ahead)[len(ahead) // 2]
        if factor > _NOTHING:
            why = (
                f"row {row} of the source does not depend on row {row} of the site at all, but on others such "
                f"as row {other}"
            )
            raise _refused(source, site, why)
        why = f"rows are mixed, and row {row} of the source depends on row {other} of the site most"
        if 2 * far > len(ahead) or min(ahead)[0] > _ALWAYS:
            self.doubts[site] = _refused(source, site, why)


def _codes(count: int, draw: torch.Generator) -> Tensor:
    """Powers of two, so that rows with the same one are rarely next to each other."""
    return 2.0 ** (torch.randperm(count, generator=draw, device="cpu") % 7 - 3)


def _permuted(plain: Tensor, coded: Tensor, told: Tensor, code: Tensor) -> int | None:
    """A row of the site that leads to another row of the source; None where some lead to several."""
    a, b = plain.flatten(1)[told].double(), coded.flatten(1)[told].double()
    ratio = (a * b).sum(1) / a.square().sum(1)
    nearest = (ratio.unsqueeze(1) - code.double()).abs().argmin(1)
    found = code.double()[nearest].unsqueeze(1)
    if bool(((b - found * a).norm(dim=1) > _ROOM * b.norm(dim=1)).any()):
        return None
    rows = told.nonzero().flatten()
    wrong = (code[rows] != code[nearest]).nonzero().flatten()
    return int(rows[wrong[0]]) if len(wrong) else None


def _sketch(gradient: Tensor) -> Tensor:
    """`[N, k]`: sums of each row's numbers under random signs. Rows of one direction have sums of that direction."""
    rows = widened(gradient.flatten(1))
    each = rows.shape[1] // _SUMS
    whole, rest = rows[:, : _SUMS * each], rows[:, _SUMS * each :]
    draw = torch.Generator().manual_seed(each)
    signs = torch.randint(2, (_SUMS, each), generator=draw, device="cpu").to(rows) * 2 - 1
    sums = torch.einsum("nkf,kf->nk", whole.unflatten(1, signs.shape), signs)
    return torch.cat([sums, rest], 1)


def _coded(plain: Tensor, coded: Tensor, code: Tensor, dim: int) -> bool:
    """Whether the one gradient is the other times the codes along this dimension."""
    shape = [1] * plain.dim()
    shape[dim] = len(code)
    expected = (plain * code.view(shape)).movedim(dim, 0).flatten(1)
    found = coded.movedim(dim, 0).flatten(1)
    return bool(((found - expected).norm(dim=1) <= _ROOM * expected.norm(dim=1)).all())


def _of_one_layer(end: Edge | Local) -> bool:
    """Whether the edge leads over one layer only, which keeps rows apart."""
    return isinstance(end.site, LayerInput) and end.source == end.site.source


def _refused(source: Source, site: Site, why: str) -> AttachError:
    return AttachError(
        f"the error of row i of the source {source.name!r} is sent to row i of site {site.name!r}, but "
        f"the model does not keep the rows in place: {why} (a batch that is sorted, routed or turned to "
        "time-first; a graph without self loops?). Send the error of a tensor whose rows are the site's: name the module that makes "
        "it with `error_at=`, or take it with `output=`; or choose other `sites=`."
    )
