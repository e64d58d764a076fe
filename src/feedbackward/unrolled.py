"""Recurrent layers run step by step, so that the state of each step can be a site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from feedbackward.errors import FeedbackError

State = tuple[Tensor, ...]


def unroll(rnn: nn.RNNBase) -> Unrolled:
    r"""An `nn.RNN`, `nn.GRU` or `nn.LSTM` as a module that runs step by step with the same parameters.

    It takes and returns what the layer does, has the same keys in its `state_dict`, and gives the same numbers. Layer k calls
    its module `steps.k` once per step, whose output is the state :math:`h_t`. As a site it is cut at every step:

    .. math::
        \delta h_t = e_t B, \qquad e_t = \partial L / \partial a_t \text{ of the source's own step } t

    All steps share `B`. No gradient goes from a step to the one before it, so there is no backward pass through time, and a
    long sequence may be given in pieces, whose gradients add up to those of the whole. Where the source has no steps (one
    answer for a sequence), its error goes to every step. Padded steps of a `PackedSequence` are zero and get no signal; the
    keys of the layer's own order come back as they were.

    Raises FeedbackError for bidirectional layers, projections (`proj_size`), and other modules.

    With fixed `B` it is e-prop (Bellec et al. 2020, "A solution to the learning dilemma for recurrent networks of spiking neurons")
    without its eligibility traces, which carry what earlier steps did to a state.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import feedbackward as fb
        >>> class Tagger(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.rnn, self.head = fb.unroll(nn.GRU(4, 8, batch_first=True)), nn.Linear(8, 3)
        ...     def forward(self, x):
        ...         return self.head(self.rnn(x)[0])
        >>> x, y = torch.randn(16, 5, 4), torch.randint(3, (16, 5))
        >>> learner = fb.attach(Tagger(), fb.DFA(), example=x, sites=["rnn.steps.0"])
        >>> nn.functional.cross_entropy(learner(x).flatten(0, 1), y.flatten()).backward()
        >>> [tuple(B.shape) for B in learner.feedback.buffers()]  # one B for all steps
        [(3, 8)]
    """
    if type(rnn) not in (nn.RNN, nn.GRU, nn.LSTM):
        raise FeedbackError(
            f"unroll takes an nn.RNN, nn.GRU or nn.LSTM, not a {type(rnn).__name__}."
        )
    if rnn.bidirectional or rnn.proj_size:
        raise FeedbackError(
            "unroll does not run layers that are bidirectional or have a proj_size. Use two layers, one of them on the sequence "
            "turned round and with a source of its own; or leave the layer whole and name it as a site."
        )
    return Unrolled(rnn)


class Unrolled(nn.Module):
    """What :func:`unroll` returns."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        for name, parameter in rnn.named_parameters():
            self.register_parameter(name, parameter)
        self.batch_first, self.dropout, self.bias = rnn.batch_first, rnn.dropout, rnn.bias
        self.hidden_size, self.num_layers = rnn.hidden_size, rnn.num_layers
        self.kind = type(rnn).__name__
        step = _STEPS[getattr(rnn, "nonlinearity", self.kind)]
        self.steps = nn.ModuleList(Step(step) for _ in range(rnn.num_layers))
        self.train(rnn.training)

    def forward(self, x: Any, state: Any = None) -> tuple[Any, Any]:
        packed = x if isinstance(x, PackedSequence) else None
        mask = None
        if packed is not None:
            x, lengths = pad_packed_sequence(packed, batch_first=True)
            mask = torch.arange(x.shape[1]) < lengths.unsqueeze(1)
            mask = mask.to(x.device).unsqueeze(-1)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        if x.dim() != 3:
            raise FeedbackError(
                f"an unrolled {self.kind} takes a batch of sequences of vectors, got {x.dim()} dimensions: add a batch of one."
            )
        states = self._states(x, state)
        lasts = []
        for layer, first in enumerate(states):
            x, last = self._layer(layer, x, first, mask)
            lasts.append(last)
            if layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        ends = tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))
        if packed is not None:
            out: Any = _packed(x, packed)
        else:
            out = x if self.batch_first else x.transpose(0, 1)
        return out, ends if self.kind == "LSTM" else ends[0]

    def _states(self, x: Tensor, state: Any) -> list[State]:
        """The state of each layer before the first step."""
        parts = 2 if self.kind == "LSTM" else 1
        if state is None:
            zeros = x.new_zeros(len(x), self.hidden_size)
            return [(zeros,) * parts for _ in range(self.num_layers)]
        given = state if isinstance(state, tuple) else (state,)
        return [tuple(part[layer] for part in given) for layer in range(self.num_layers)]

    def _layer(
        self, layer: int, x: Tensor, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        weights = [getattr(self, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh")]
        biases = [
            getattr(self, f"{name}_l{layer}") if self.bias else None
            for name in ("bias_ih", "bias_hh")
        ]
        outputs = []
        # what the inputs give is one product for all steps
        for t, given in enumerate(F.linear(x, weights[0], biases[0]).unbind(1)):
            there = None if mask is None else mask[:, t]
            new = self.steps[layer](given, state, weights[1], biases[1], there)
            outputs.append(new[0])
            if there is not None:
                new = tuple(torch.where(there, a, b) for a, b in zip(new, state, strict=True))
            state = new
        return torch.stack(outputs, 1), state


class Step(nn.Module):
    """One step of a recurrent layer: its state, a tuple whose first tensor is the output. It holds no parameters."""

    def __init__(self, function: Callable[..., State]) -> None:
        super().__init__()
        self.function = function

    def forward(
        self,
        given: Tensor,
        state: State,
        weight: Tensor,
        bias: Tensor | None,
        there: Tensor | None = None,
    ) -> State:
        """given: what the input gives to the gates. there: [N, 1], false where the step is padding, whose state is zero."""
        new = self.function(given, F.linear(state[0], weight, bias), state)
        return new if there is None else tuple(part * there for part in new)


def _tanh(given: Tensor, carried: Tensor, state: State) -> State:
    return ((given + carried).tanh(),)


def _relu(given: Tensor, carried: Tensor, state: State) -> State:
    return ((given + carried).relu(),)


def _gru(given: Tensor, carried: Tensor, state: State) -> State:
    (r_in, z_in, n_in), (r, z, n) = given.chunk(3, -1), carried.chunk(3, -1)
    reset, update = (r_in + r).sigmoid(), (z_in + z).sigmoid()
    new = (n_in + reset * n).tanh()
    return ((1 - update) * new + update * state[0],)


def _lstm(given: Tensor, carried: Tensor, state: State) -> State:
    i, f, g, o = (given + carried).chunk(4, -1)
    memory = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * memory.tanh(), memory


_STEPS = {"tanh": _tanh, "relu": _relu, "GRU": _gru, "LSTM": _lstm}


def _packed(x: Tensor, like: PackedSequence) -> PackedSequence:
    """[N, T, n] in the order and with the lengths of another packed sequence."""
    ordered = x if like.sorted_indices is None else x.index_select(0, like.sorted_indices)
    data = torch.cat([ordered[:size, t] for t, size in enumerate(like.batch_sizes.tolist())])
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
