"""The source: the tensor whose error is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from feedbackward.errors import AttachError
from feedbackward.graph import Source
from feedbackward.model.places import called_once, float_leaf, known_modules, output_place
from feedbackward.model.trace import Trace
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
    """What enters the layer that makes the source, if that is a Linear with many scores of each token (a vocabulary).

    None if it is not, or if no module makes its input.
    """
    (point,) = source.points
    head = called_once(trace, point.module) if point.module else None
    if head is None or not isinstance(head.module, nn.Linear) or not source.tokens:
        return None
    if head.module.out_features < WIDE * head.module.in_features:
        return None
    _, tensor, version = head.activity
    made = trace.producer(tensor, version, head.start)
    return None if made is None else output_place(Source, trace, *made)
