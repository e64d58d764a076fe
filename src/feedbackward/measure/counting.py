"""Counting the passes of a learner: products by what they are for, and what autograd saves."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from feedbackward.engine.autograd import BROADCAST, SHARE
from feedbackward.errors import AttachError

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """A product of the forward pass. `layer`: the name of the weight in it, "" where it has none.

    `moving`: how many of its operands depend on the inputs: one in a layer, both in attention, none where weights are made
    of weights. `kind`: "forward", "auxiliary" in a local loss's network, "feedback" where signals are prepared.
    """

    layer: str
    moving: int
    kind: str


class Products(TorchDispatchMode):
    """Counts the multiply-adds of all matrix products and convolutions that run under it.

    `macs` by what they are for and by layer: "forward"; in the backward pass "weight_gradients", "input_gradients",
    "feedback" (all within a broadcast, and signals that go up) and "learning" (feedback that shares a weight's gradient);
    "auxiliary" (networks of local losses).

    Autograd numbers its nodes; an operation of the forward pass is known again in the backward pass by that number.
    """

    def __init__(self, model: nn.Module, feedback: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.macs: Counter[tuple[str, str]] = Counter()
        self.products: dict[int, Product] = {}
        self._layers = {
            _key(p): name.removesuffix(".weight") for name, p in model.named_parameters()
        }
        self._auxiliary = {_key(p) for module in feedback.children() for p in module.parameters()}
        # storages that depend on the inputs; kept alive, so that none of later tensors gets the number of an earlier one
        self._moving = {_key(t): t.untyped_storage() for t in _tensors(inputs)}
        self._part = "forward"
        self._nodes: dict[int, bool] = {}  # whether the node's result depends on the inputs

    def as_feedback(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, whose products in the forward pass are part of the feedback."""

        def marked(*args: Any, **kwargs: Any) -> Tensor:
            before, self._part = self._part, "feedback"
            try:
                return function(*args, **kwargs)
            finally:
                self._part = before

        return marked

    def total(self, kind: str) -> int:
        return sum(count for (of, _), count in self.macs.items() if of == kind)

    def made_of_weights(self, node: Any) -> bool:
        """Whether an autograd node stands for a parameter, or for what is made of parameters only."""
        return hasattr(node, "variable") or not self._nodes.get(node._sequence_nr(), True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", func)
        if torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
            self._backward(packet, args, kwargs, out)
        else:
            self._forward(packet, args, kwargs, out)
        return out

    def _forward(self, packet: Any, args: Any, kwargs: Any, out: Any) -> None:
        operands = list(_tensors((args, kwargs)))
        moving = [t for t in operands if _key(t) in self._moving]
        if moving and packet is not aten.ones_like:  # with which a backward pass begins
            self._moving.update((_key(t), t.untyped_storage()) for t in _tensors(out))
        recorded = any(t.requires_grad for t in operands)
        number = torch.autograd._get_sequence_nr() - 1  # of the node that was just made
        if recorded and packet is not aten.detach:  # which makes no node
            self._nodes[number] = bool(moving) or self._nodes.get(number, False)
        count = _count(packet, args, kwargs, out)
        if count:
            keys = [_key(t) for t in _factors(packet, operands)]
            names = [self._layers[key] for key in keys if key in self._layers]
            product = Product(
                names[0] if names else "",
                moving=sum(key in self._moving for key in keys),
                kind="auxiliary" if any(key in self._auxiliary for key in keys) else self._part,
            )
            self.macs[product.kind, product.layer] += count
            if recorded:
                self.products.setdefault(number, product)

    def _backward(self, packet: Any, args: Any, kwargs: Any, out: Any) -> None:
        counts = _backward_counts(packet, args, kwargs, out)
        if not any(counts.values()):
            return
        node = torch._C._current_autograd_node()
        own = next((kind for of, kind in _OWN.items() if isinstance(node, of)), None)
        if own is not None:
            self.macs[own, ""] += sum(counts.values())
            return
        product = self.products.get(-1 if node is None else node._sequence_nr())
        for of, count in counts.items():
            kind = self._kind(product, of, _tensors((args, kwargs)))
            self.macs[kind, product.layer if product else ""] += count

    def _kind(self, product: Product | None, of: str, operands: Iterable[Tensor]) -> str:
        if product is not None and product.kind != "forward":
            return product.kind
        if product is not None and product.moving != 1:
            return "input_gradients" if product.moving else "weight_gradients"
        if of:
            return of
        # in a layer, the error times the activity makes the gradient of the weight
        moving = any(_key(t) in self._moving for t in operands)
        return "weight_gradients" if moving else "input_gradients"


# nodes of the cuts: what their products are for
_OWN = {BROADCAST: "feedback", SHARE: "learning"}


class Saved:
    """Follows the bytes that autograd holds for the backward pass, storage by storage; their highest sum is `peak`.

    Parameters and buffers (`known`) are not counted: they are there anyway.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.now = self.peak = 0
        self._known = {_key(t) for t in known}
        self._uses: Counter[int] = Counter()

    def hooks(self) -> Any:
        """A context in which what autograd saves is followed."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)

    def within(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, whose savings are followed also where other hooks are in place."""

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            with self.hooks():
                return function(*args, **kwargs)

        return watched

    def pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        if key not in self._known:
            self._uses[key] += 1
            if self._uses[key] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(held, self._drop, key, size)
        return held

    def _drop(self, key: int, size: int) -> None:
        self._uses[key] -= 1
        if not self._uses[key]:
            self.now -= size


class _Held:
    """A saved tensor, for as long as autograd keeps it. Detached: a result that its own node holds would never be let go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def _backward_counts(packet: Any, args: Any, kwargs: Any, out: Any) -> dict[str, int]:
    """Multiply-adds by what they make; "" where the operation itself does not say."""
    if packet is not aten.convolution_backward:
        return {"": _count(packet, args, kwargs, out)}
    error, x, weight, *_ = args
    transposed, mask = args[7], args[10]
    # both adjoints of a convolution multiply the same pairs as the convolution does
    count = conv_flop_count(list(x.shape), list(weight.shape), list(error.shape), transposed) // 2
    return {"input_gradients": count * mask[0], "weight_gradients": count * mask[1]}


def _factors(packet: Any, operands: list[Tensor]) -> list[Tensor]:
    """The two tensors that are multiplied."""
    return operands[1:3] if packet in (aten.addmm, aten.baddbmm) else operands[:2]


def _count(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Multiply-adds of an operation; 0 for what is neither a product nor a convolution."""
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out)) // 2
    name = str(packet)
    if "_rnn" in name:
        raise AttachError(
            f"the products within {name.removeprefix('aten.')} cannot be counted: make the model under `torch.device('meta')`, where "
            "it is run step by step."
        )
    return 0


def _tensors(values: Any) -> Iterator[Tensor]:
    return (t for t in tree_leaves(values) if isinstance(t, Tensor))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
