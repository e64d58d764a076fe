"""The source: the tensor whose error is sent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from feedbackward.activity import Source
from feedbackward.errors import AttachError
from feedbackward.model.autograd_graph import (
    Node,
    Output,
    below,
    dominators,
    is_product,
    outputs_behind,
    walk,
)
from feedbackward.model.places import called_once, float_leaf, known_modules, output_place
from feedbackward.model.trace import Call, Trace
from feedbackward.model.values import describe_type, is_opaque, tensors_in

# how many times wider than its input a head of tokens must be for the error to be taken below it
WIDE = 4


def find_source(
    model: nn.Module, trace: Trace, error_at: str | None, output: Callable[[Any], Tensor] | None
) -> Source:
    """The tensor whose error is broadcast: the model's output, or the output of the module `error_at`."""
    if error_at is not None:
        call = called_once(trace, known_modules(model, [error_at])[0])
        return output_place(Source, trace, call, float_leaf(call))
    tensor = _output_tensor(trace, output)
    if tensor.dim() == 0:
        raise AttachError(
            "the model's output is a single number (a loss?), which has no error per sample: name the module that makes the "
            'predictions, for example `error_at="head"`, or return them and compute the loss outside.'
        )
    found = trace.producer(tensor, tensor._version, trace.by_end[-1].end + 1)
    if found is None and any(is_opaque(leaf) for leaf in tree_leaves(trace.output)):
        raise AttachError(
            f"the model returns {describe_type(trace.output)}, and no module makes the tensor that output= takes from it, so there is "
            "no place for a hook. Make its last operation a module (nn.LogSoftmax for F.log_softmax), name the module before it "
            "with `error_at=`, or return a tuple or a dict."
        )
    if found is None:
        raise AttachError(
            "output= must return one of the tensors that the model returns, as it is (for example "
            "`output=lambda o: o.logits`); compute anything further in the loss."
        )
    return output_place(Source, trace, *found)


def source_tensor(trace: Trace, source: Source) -> tuple[Tensor, int]:
    """The source as the trace recorded it, and the time at which it was made."""
    (point,) = source.points
    call = next(c for c in trace.calls if c.name == point.module)
    return trace.tensor_at(point), call.end


def _output_tensor(trace: Trace, output: Callable[[Any], Tensor] | None) -> Tensor:
    value = trace.output if output is None else output(trace.output)
    if isinstance(value, Tensor):
        return value
    # where there is only one, nobody has to choose
    trained = [t for t in tensors_in(value) if t.requires_grad]
    if output is None and len(trained) == 1:
        return trained[0]
    plain = isinstance(value, dict) and not hasattr(value, "logits")
    field = 'o["logits"]' if plain else "o.logits"
    raise AttachError(
        f"the model returns {describe_type(value)}: say which tensor's error is broadcast, for example "
        f"`output=lambda o: {field}` or `output=lambda o: o[0]`, or name its module with `error_at=`."
    )


def below_wide_head(trace: Trace, source: Source) -> Source | None:
    """What enters the layer that makes the source, if that makes many scores of each token (a vocabulary).

    Views and functions may lie on both sides of the layer: what is taken is the nearest module's output that everything below
    passes through. None if there is no such layer, or no such output right below it.
    """
    tensor, _ = source_tensor(trace, source)
    # how many rows the scores have been seen to have, and how many there are in each
    scores = [_per_row(tensor, source.tokens)]
    for call, leaf in _passed(trace, tensor):
        made = call.outputs[leaf][0]
        tokens = trace.tokens(made, call.end)
        rows, units = _per_row(made, tokens)
        if made.numel() == tensor.numel():
            scores.append((rows, units))
            continue
        wide = tokens and any(rows == r and WIDE * units <= n for r, n in scores)
        return output_place(Source, trace, call, leaf) if wide else None
    return None


def _per_row(tensor: Tensor, tokens: int) -> tuple[int, int]:
    """How many rows (samples, or their tokens) a tensor has, and how many numbers in each."""
    rows = tensor.shape[: 1 + tokens].numel()
    return rows, tensor.numel() // max(rows, 1)


def _passed(trace: Trace, tensor: Tensor) -> Iterator[tuple[Call, int]]:
    """The outputs of modules that all paths to the tensor pass through, the nearest first, down to its layer's input.

    Of modules that are called once, with the numbers of the leaves.
    """
    made: dict[Output, tuple[Call, int]] = {}
    for call in trace.by_end:
        if trace.counts[call.name] == 1:
            for leaf, output in enumerate(call.left):
                if output[0] is not None and output not in call.entered:
                    made.setdefault(output, (call, leaf))
    numbers: dict[Node, list[int]] = defaultdict(list)
    for node, number in outputs_behind(tensor):
        numbers[node].append(number)
    through = dominators(tensor)
    # how many products lie on a path from the tensor to a node, at most
    above: dict[Node, int] = defaultdict(int)
    for node in walk([tensor.grad_fn]):
        if node in through and above[node] <= 1 and len(numbers[node]) == 1:
            output = (node, numbers[node][0])
            if output in made:
                yield made[output]
        for other in below(node):
            above[other] = max(above[other], above[node] + is_product(node))
