"""`pipeline` and the `Pipeline`: a learner whose segments are divided over the ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from feedbackward.engine.outside import is_fsdp, is_shard
from feedbackward.errors import AttachError, CheckpointError, DivergenceError, FeedbackError
from feedbackward.learner import Learner
from feedbackward.model.state import as_written
from feedbackward.parallel.agreement import agree, facts
from feedbackward.parallel.choosing import check_delay, choose_division
from feedbackward.parallel.division import Division, count_rows, drop_others
from feedbackward.parallel.faults import Witnesses
from feedbackward.parallel.greeting import Greeting
from feedbackward.parallel.groups import Groups, make_groups
from feedbackward.parallel.mail import BACKWARD, Mail
from feedbackward.parallel.routes import refuse_rule
from feedbackward.parallel.segment import StageModule
from feedbackward.parallel.step import Batch, Loss, LossFn, Steps, cut_rows, sizes_of
from feedbackward.parallel.timeline import Timeline

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    # its imports take seconds, and one process does not need them
    from feedbackward.parallel.stage import Order, Stage

InFlight = Literal["all", "few"]


def pipeline(
    learner: Learner,
    example: Any,
    *,
    micro_batches: int = 4,
    cut: str | Sequence[str] = "auto",
    mesh: DeviceMesh | None = None,
    in_flight: InFlight = "all",
    delay: int = 0,
    timeout: float = 60.0,
) -> Pipeline:
    """Divide a learner over the ranks of `torch.distributed`, so that all run their backward at
    the same time.

    Call it on every rank with the same learner; afterwards each rank holds the weights, the
    feedback and the optimizer of its own part only, and the learner itself is used up. Activities
    go from each rank to the next. With direct feedback (DFA, DKP), the last rank sends the error,
    `N x C` numbers, to every rank, and no rank waits for the backward of another. Chains (FA,
    KolenPollack) and backprop send a gradient from rank to rank; DRTP and DGL send nothing back.

    Args:
        learner: as `attach` returned it, with the same seeds on every rank.
        example: inputs as for `attach`, of the shape used in training, under the same autocast.
        micro_batches: a batch is divided into so many parts. Batch norm and `center=True` see one
            part at a time.
        cut: names of modules at whose outputs the model is divided, one fewer than ranks. `"auto"`:
            where the slowest rank is as fast as it can be, by segments timed on rank 0.
        mesh: a `DeviceMesh` with dimensions named "pipeline" and "data", in any order. Gradients
            are averaged over "data". Default: one pipeline of all ranks.
        in_flight: `"all"`: a rank runs all its forward passes first, which is the fastest order for
            direct feedback and holds the activities of all micro-batches. `"few"`: one forward and
            one backward in turn, which holds as many as there are later ranks. Chains and backprop
            always use `"few"`.
        delay: gradients arrive so many steps late, as with :class:`Delayed`, so that a
            step's forward passes need not wait for the updates of the last steps. Each holds a copy of
            this rank's weights. 0 is exact.
        timeout: seconds after which a wait for another rank is an error.

    Raises:
        AttachError: the model cannot be divided there, the rule cannot be divided, there are more
            ranks than segments, or ranks differ in what they have.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.nn.functional as F
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DKP(), example=x)
        >>> pipe = fb.parallel.pipeline(learner, x)  # under torchrun: on every rank
        >>> optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
        >>> loss = pipe.backward(x, F.cross_entropy, y)
        >>> optimizer.step()
        >>> loss.item() > 0
        True
    """
    if micro_batches < 1 or micro_batches > 1000:
        raise AttachError(f"micro_batches must be from 1 to 1000, got {micro_batches}.")
    check_delay(learner, delay)
    groups = make_groups(mesh, timeout)
    named = [] if cut == "auto" else [cut] if isinstance(cut, str) else list(cut)
    refuse_rule(learner.rule, learner.graph, groups.size)
    options = f"micro_batches={micro_batches}, cut={cut}, in_flight={in_flight}, delay={delay}"
    rule = f"{learner.rule} with seed {learner.seed}"
    agree(groups.up, facts(learner.model, learner.feedback, rule=rule, options=options))
    agree(groups.data, facts(learner.model, learner.feedback, rule=rule, options=options))
    with as_written(learner.model.modules()):
        division = choose_division(learner, example, named, groups)
    pipe = Pipeline(learner, division, groups, micro_batches, in_flight, timeout)
    pipe._steps.delay = delay
    return pipe


class Pipeline(nn.Module):
    """One rank's part of a divided learner. `parameters()` and `state_dict()` are those of this
    part, under the learner's names.

    Attributes:
        division: where the learner is divided, and who holds what.
        rank, ranks: of the pipeline, from 0.
        step: the number of the next step. Random masks depend on it, so set it when a run is resumed.
        mail: the messages; `mail.sent` and `mail.received` count bytes by kind.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> learner = fb.attach(model, fb.DFA(), example=x)
        >>> pipe = fb.parallel.pipeline(learner, x)  # a single process is a pipeline of one rank
        >>> loss = pipe.backward(x, nn.functional.cross_entropy, y)
        >>> all(p.grad is not None for p in pipe.parameters())
        True
    """

    def __init__(
        self,
        learner: Learner,
        division: Division,
        groups: Groups,
        micro_batches: int,
        in_flight: InFlight,
        timeout: float,
    ) -> None:
        super().__init__()
        self.rule, self.seed = learner.rule, learner.seed
        self.needs_target = learner.attached.needs_target
        self.division, self._groups = division, groups
        self.rank, self.ranks, self.micro_batches = groups.rank, groups.size, micro_batches
        self.step = self._wish = self.stopping = 0
        if self.ranks > 1:
            learner.detach()
            drop_others(learner, division, self.rank)
        self.module = StageModule(
            learner, division.recording, division.bounds(self.rank), division.routes, self.rank
        )
        self.mail = Mail(groups.up, groups.down, timeout)
        number = (learner.seed, groups.data_rank)
        self._steps = Steps(self.module, division, self.mail, self.rank, number)
        locked = any(division.routes.uncut)
        self._order: Order = "forwards first"
        if locked or in_flight == "few":
            self._order = "one forward one backward"
        self._schedules: dict[Any, Any] = {}
        self._before: int | None = None
        self._greeting = Greeting(self.mail)
        self._witnesses = Witnesses(self.rank, self.ranks, groups.name)
        self._stage: Stage | None = None
        if groups.up is not None:
            from feedbackward.parallel.stage import Stage, refuse_version

            refuse_version()
            place = self.rank, self.ranks
            self._stage = Stage(self.module, self._steps, place, self._steps.device, groups.up)

    def backward(self, inputs: Any, loss_fn: LossFn, target: Any = None) -> Loss:
        """Forward and backward on a batch; adds to the gradients of this rank's part.

        Call it on every rank with the same batch. Nothing waits for other ranks except where this
        rank needs what they send, so the next step may begin here before it has ended elsewhere.

        Args:
            inputs: of the model: a tensor, a tuple of arguments or a dict of keywords.
            loss_fn: `loss_fn(output, target) -> scalar`, a mean over samples. It is called on the
                last rank, on each micro-batch, and the loss is the mean over the batch.
            target: of the batch, or None where the loss needs none. Rules that need targets (DRTP,
                DGL) get these.

        Raises:
            DivergenceError: a loss or error is not finite; on every rank, before any has updated.
            LostRankError: another rank ended or did not answer.
        """
        if self.needs_target and not isinstance(target, Tensor):
            raise FeedbackError(f"{self.rule.label} needs targets: pipe.backward(x, loss_fn, y).")
        rows = count_rows(inputs)
        sizes = sizes_of(rows, self.micro_batches, 2)
        batch = Batch(self.step, cut_rows(inputs, sizes), cut_rows(target, sizes), sizes, loss_fn)
        with self._witnesses.watching():
            self._run(batch)
        self.step += 1
        return Loss(self._steps, batch.number)

    def _run(self, batch: Batch) -> None:
        self._check_module()
        self.mail.settle()
        self._steps.begin(batch)
        self.stopping = self._greeting.exchange(batch, self._wish)
        if self._stage is not None:
            from feedbackward.parallel.stage import run_step

            run_step(self._stage, self._schedules, self._steps.parts, self._order)
        else:
            self._in_turn(self._steps.parts)
        self._steps.end()
        self._average()
        self._check_last()

    def ask_to_stop(self, signum: int = 15) -> None:
        """On rank 0: let every rank know, with its next step, that it is the last. `stopping` is then
        this number on all ranks after the same step; before, it is 0."""
        self._wish = signum

    def _in_turn(self, micro_batches: int) -> None:
        """A step on one rank."""
        for index in range(micro_batches):
            self._steps.forward(index)
        for index in range(micro_batches):
            tensors, grads, _ = self._steps.tensors_for_backward(index)
            if tensors:
                torch.autograd.backward(tensors, grads)
            self._steps.after_backward(index, ())

    def _check_module(self) -> None:
        """Refuse another module, which would not be run, and shards whose gradients nobody would reduce."""
        if self.module is not self._steps.module:
            raise FeedbackError(
                f"pipe.module was replaced by a {type(self.module).__name__}, which the steps do not run: change it in place, as "
                "`pipe.module.compile()` and `fully_shard(pipe.module)` do."
            )
        # a stage's backward does not begin at its output
        whole = self._stage is not None and is_fsdp(self.module)
        if not whole and any(is_shard(p) for p in self.parameters()):
            raise FeedbackError(
                "layers of this stage are sharded by FSDP, and the stage is not, so their gradients would not be reduced: after "
                "the layers, call `fully_shard(pipe.module, mesh=mesh['data'], ignored_params={p for p in "
                "pipe.module.parameters() if p.is_meta})`; for a pipeline of one rank, shard the learner instead."
            )

    def _average(self) -> None:
        """Average the gradients over the replicas of this stage; FSDP2 has done so with those that it shards."""
        if self._groups.data is None:
            return
        replicas = dist.get_world_size(self._groups.data)
        for p in self.parameters():
            if p.grad is not None and not is_shard(p):
                dist.all_reduce(p.grad, group=self._groups.data)
                p.grad /= replicas

    def _check_last(self) -> None:
        """The loss of the step before has arrived by now; what is not finite stops every rank."""
        before, self._before = self._before, self.step
        if before is None:
            return
        if not torch.isfinite(self._steps.loss(before)):
            raise DivergenceError(f"step {before}: the loss is not finite. Use smaller rates.")
        self._steps.losses.pop(before - 8, None)

    @torch.no_grad()
    def evaluate(self, inputs: Any) -> Any:
        """The model's output on a batch, in evaluation mode, on every rank.

        Call it on every rank with the same inputs. Where the model returns something else than a
        tensor, the other ranks than the last get None.
        """
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        try:
            with self._witnesses.watching():
                return self._steps.evaluate(inputs, count_rows(inputs))
        finally:
            for module, mode in modes:
                module.training = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise FeedbackError(
            "a rank holds a part of the model: call pipe.backward or pipe.evaluate. For replicas, give `pipeline` a mesh with "
            'a "data" dimension; it averages their gradients itself, without DistributedDataParallel.'
        )

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that this rank trains, under the learner's names."""
        own = set(self.division.parts[self.rank])
        for name, p in self.module.named_parameters("", recurse, remove_duplicate):
            if name in own:
                yield (f"{prefix}.{name}" if prefix else name), p

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The part of the learner's `state_dict` that this rank holds, under the same keys.

        The parts of all ranks together are that of the learner: `torch.distributed.checkpoint` saves
        them as one, to be read by any number of ranks.
        """
        whole = self.module.state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        own = {f"{prefix}{key}" for key, s in self.division.holders.items() if s == self.rank}
        for key in list(whole):
            if key.startswith(prefix) and key not in own:
                del whole[key]
        return whole

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take this rank's part from a learner's `state_dict`, or from a part of one.

        Raises CheckpointError where a tensor of this part is missing.
        """
        own = self.state_dict()
        missing = [key for key in own if key not in state_dict]
        if missing and strict:
            raise CheckpointError(
                f"rank {self.rank} needs {missing[0]!r}, which the state does not hold: give it the whole learner's."
            )
        part = {key: state_dict[key] for key in own if key in state_dict}
        return self.module.load_state_dict(part, strict=False, assign=assign)

    def gather_state(self) -> dict[str, Tensor] | None:
        """The whole learner's `state_dict` on rank 0, and None on the others. Call it on every rank."""
        own = {key: _whole(value).detach().cpu() for key, value in self.state_dict().items()}
        if self._groups.up is None:
            return own
        parts: list[Any] | None = [None] * self.ranks if self.rank == 0 else None
        dist.gather_object(own, parts, group=self._groups.up, group_dst=0)
        if parts is None:
            return None
        together = {key: value for part in parts for key, value in part.items()}
        return {key: together[key] for key in self.division.holders}

    def start_trace(self) -> None:
        """From now on, note when this rank does what, for `write_trace`. Call it on every rank."""
        self._timeline = Timeline(self.mail)
        self._steps.trace = self._timeline.events

    def write_trace(self, path: str | os.PathLike[str]) -> list[Any] | None:
        """Write what all ranks did since `start_trace`, as a Chrome trace (for chrome://tracing or
        ui.perfetto.dev). Call it on every rank; rank 0 writes, and gets the events of each rank."""
        self._steps.trace = None
        return self._timeline.write(path)

    @property
    def bytes_in_backward(self) -> int:
        """Bytes that this rank has received for its backward passes since the beginning."""
        return sum(self.mail.received[kind] for kind in BACKWARD)


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 shards, from all its parts."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
