"""A recorded forward pass: which module made which tensor, when, and what the tensor depends on."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from feedbackward.activity import EVERY, HookPoint
from feedbackward.errors import AttachError
from feedbackward.model.autograd_graph import (
    Output,
    below,
    is_product,
    made_by,
    of_parameters,
    parameter_behind,
    walk,
)
from feedbackward.model.example import as_in_training, run_example
from feedbackward.model.features import CHANNELS_FIRST, CONVOLUTIONS, FEATURES_LAST, feature_axis
from feedbackward.model.state import Parts
from feedbackward.model.values import by_place

PARAMETRIC = (nn.Linear, *CONVOLUTIONS)
# activations without parameters that work on each number by itself
ELEMENTWISE = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
)


@dataclass
class Call:
    """One call of one module: its tensors, with the version each had, and when it began and ended."""

    name: str
    module: nn.Module
    # how many calls of this module came before
    index: int
    start: int
    inputs: list[tuple[Tensor, int]]
    # where each input is among the arguments and keywords
    places: list[str]
    # the places of all that was given, tensors or not
    given: list[str]
    end: int = -1
    outputs: list[tuple[Tensor, int]] = field(default_factory=list)
    # what made the inputs and the outputs, before an operation changed them in place
    entered: list[Output] = field(default_factory=list)
    left: list[Output] = field(default_factory=list)
    structured: bool = False
    grad_enabled: bool = True

    @property
    def activities(self) -> list[tuple[int, Tensor, int]]:
        """The inputs that depend on parameters, as (number, tensor, version), or the first other input if none does.

        Other inputs, such as a mask, an adjacency matrix or a weight that was made of parameters alone, may stand before or
        after the activity.
        """
        found: dict[int, tuple[int, Tensor, int]] = {}
        # what follows the sequence is a state
        given = self.inputs[:1] if isinstance(self.module, nn.RNNBase) else self.inputs
        for number, (tensor, version) in enumerate(given):
            if tensor.grad_fn is not None and not of_parameters(tensor):
                found.setdefault(id(tensor), (number, tensor, version))
        others = [(n, t, v) for n, (t, v) in enumerate(self.inputs) if t.grad_fn is None]
        return list(found.values()) or others[:1] or [(0, *self.inputs[0])]

    @property
    def activity(self) -> tuple[int, Tensor, int]:
        """The first of the inputs that depend on parameters."""
        return self.activities[0]

    @functools.cached_property
    def products(self) -> list[Any]:
        """The nodes in which a module without parts multiplies by a weight of its own."""
        own = {id(p) for p in self.module.parameters(recurse=False) if p.dim() > 1}
        if not own or not self.inputs or next(self.module.children(), None) is not None:
            return []
        given = {node for node, _ in self.entered}
        within = walk(
            [node for node, _ in self.left], lambda node: [] if node in given else below(node)
        )
        found = [node for node in within if node not in given and is_product(node)]
        return [n for n in found if any(id(parameter_behind(part)) in own for part in below(n))]

    @property
    def is_layer(self) -> bool:
        """Whether the module multiplies an activity with a weight of its own, of whatever class it is.

        Of recurrent layers, those that take whole sequences with the batch first: `[N, T, features]`.
        """
        if isinstance(self.module, nn.RNNBase):
            return self.module.batch_first and bool(self.inputs) and self.inputs[0][0].dim() == 3
        return isinstance(self.module, PARAMETRIC) or bool(self.products)

    @property
    def features_known(self) -> bool:
        """Whether it is a layer whose class, or whose product, says which dimension holds the features."""
        if isinstance(self.module, CHANNELS_FIRST + FEATURES_LAST):
            return True
        # a product of the last dimension; what a convolution of no class does is seen in the graph
        if not self.products or any(n.name().startswith("Convolution") for n in self.products):
            return False
        leading = self.activity[1].shape[:-1]
        return all(isinstance(t, Tensor) and t.shape[:-1] == leading for t, _ in self.outputs)


@dataclass
class Trace:
    """All module calls of one forward pass in the order in which they began, and the pass's output."""

    calls: list[Call]
    output: Any

    def __post_init__(self) -> None:
        self.counts = Counter(call.name for call in self.calls)
        self.by_end = sorted(self.calls, key=lambda call: call.end)
        self.layers: dict[Any, nn.Module] = {
            (t.grad_fn, t.output_nr): call.module
            for call in self.calls
            if call.features_known
            for t, _ in call.outputs
            if isinstance(t, Tensor) and t.grad_fn is not None
        }

    def calls_of(self, name: str) -> list[Call]:
        """The calls of a module, the first one first."""
        return [call for call in self.calls if call.name == name]

    def tensor_at(self, point: HookPoint) -> Tensor:
        """The tensor that the pass had at this point; of every call that of the last one."""
        if point.call == EVERY:
            call = self.calls_of(point.module)[-1]
        else:
            call = next(c for c in self.calls_of(point.module) if c.index == point.call)
        if point.kind == "output":
            return call.outputs[point.leaf or 0][0]
        return call.inputs[call.places.index(point.place)][0]

    def producer(self, tensor: Tensor, version: int, before: int) -> tuple[Call, int] | None:
        """The innermost module that is called once and returns `tensor` at that version, and the number of the leaf.

        A module that only returns its input (Identity) did not produce it.
        """
        for call in self.by_end:
            if call.end >= before or self.counts[call.name] > 1:
                continue
            if any(t is tensor and v == version for t, v in call.inputs):
                continue
            for leaf, (t, v) in enumerate(call.outputs):
                if t is tensor and v == version:
                    return call, leaf
        return None

    def tokens(self, tensor: Tensor, when: int) -> int:
        """How many token dimensions the tensor has: those between the batch and the features, if these come last.

        The layer that made the tensor says which dimension holds the features. If the graph leads to no layer, the one that
        takes the tensor decides, and if there is none, the last layer that ran before.
        """
        if tensor.dim() < 3:
            return 0
        axis = feature_axis(tensor, self.layers)
        if axis is not None:
            return tensor.dim() - 2 if axis == tensor.dim() - 1 else 0
        layers = [c for c in self.by_end if isinstance(c.module, CHANNELS_FIRST + FEATURES_LAST)]
        takers = [c for c in layers if any(t is tensor for t, _ in c.inputs)]
        near = takers[:1] or [c for c in layers if c.end <= when][-1:]
        return tensor.dim() - 2 if near and isinstance(near[0].module, FEATURES_LAST) else 0


class _Recorder:
    """Writes down the calls of a pass as its hooks tell of them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._open: list[Call] = []
        self._seen: Counter[str] = Counter()
        self._clock = itertools.count()

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        given, _ = by_place(args, kwargs)
        places = [place for place, t in given.items() if isinstance(t, Tensor)]
        call = Call(
            name,
            module,
            self._seen[name],
            next(self._clock),
            [(given[place], given[place]._version) for place in places],
            places,
            list(given),
            grad_enabled=torch.is_grad_enabled(),
        )
        call.entered = [made_by(t) for t, _ in call.inputs]
        self._seen[name] += 1
        self.calls.append(call)
        self._open.append(call)

    def leave(self, output: Any) -> None:
        call = self._open.pop()
        call.end = next(self._clock)
        call.structured = not isinstance(output, Tensor)
        call.outputs = [
            (t, t._version) if isinstance(t, Tensor) else (t, -1) for t in tree_leaves(output)
        ]
        call.left = [made_by(t) for t, _ in call.outputs]


def trace(model: nn.Module, example: Any, evaluation: bool = False) -> Trace:
    """Run the model once on the example and record every module call; nothing of the model changes.

    The pass is one of training, unless it is to be one of `evaluation`.

    Raises AttachError where the model cannot run on the example, or makes its parameters while it does.
    """
    if torch.is_inference_mode_enabled():
        raise AttachError(
            "attach outside torch.inference_mode(), under which no graph is recorded."
        )
    _refuse_lazy(model)
    recorder = _Recorder()
    parts = Parts(model)
    with ExitStack() as stack:
        stack.callback(parts.restore)
        stack.enter_context(as_in_training(model, batch_norms=False))
        if evaluation:
            # the modes are restored at the end of the context
            for module in model.modules():
                module.training = False
        for name, module in model.named_modules():
            pre = module.register_forward_pre_hook(
                lambda m, a, k, name=name: recorder.enter(name, m, a, k),
                prepend=True,
                with_kwargs=True,
            )
            post = module.register_forward_hook(lambda m, a, out: recorder.leave(out))
            stack.callback(pre.remove)
            stack.callback(post.remove)
        output = run_example(model, example)
        made = parts.made()
    if made is not None:
        raise AttachError(
            f"{made!r} is made in the first forward pass, so attach would have to undo it and could not see its gradients. Run the "
            "model once on a batch before attaching, and make the optimizer after that."
        )
    return Trace(recorder.calls, output)


def _refuse_lazy(model: nn.Module) -> None:
    """Refuse lazy modules: their first pass creates parameters, which could not be undone."""
    for name, module in model.named_modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(is_lazy(t) for t in own):
            raise AttachError(
                f"module {name!r} ({type(module).__name__}) is lazy: its parameters get their shapes in the first forward pass. Run "
                "the model once on a batch before attaching, and make the optimizer after that."
            )
