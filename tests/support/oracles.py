"""Naive references in NumPy: layers with hand-derived local gradients, and the rules' equations as plain loops.

Nothing of feedbackward and no autograd is used here. Symbols: N batch, T tokens, C units of the source, e the
error at the source, h an activity, B feedback weights [C, *site]; a `d` before a name means dLoss/d(name).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


class Layer:
    """`forward` keeps what `backward` needs; `backward` fills `grads` and returns the gradient of the input."""

    def __init__(self, name: str = "", **parameters: Array) -> None:
        self.name, self.parameters = name, parameters
        self.grads: dict[str, Array] = {}


class Linear(Layer):
    """y[m, o] = sum_i x[m, i] W[o, i] + b[o], m over all leading dimensions."""

    def forward(self, x: Array) -> Array:
        self.x = x
        return np.einsum("...i,oi->...o", x, self.parameters["weight"]) + self.parameters["bias"]

    def backward(self, dy: Array) -> Array:
        self.grads = {
            "weight": np.einsum(
                "mo,mi->oi", dy.reshape(-1, dy.shape[-1]), self.x.reshape(-1, self.x.shape[-1])
            ),
            "bias": dy.reshape(-1, dy.shape[-1]).sum(0),
        }
        return np.einsum("...o,oi->...i", dy, self.parameters["weight"])


class Conv(Layer):
    """Two-dimensional convolution, written as loops over output channels and positions."""

    def __init__(
        self, name: str, stride: int, padding: int, groups: int, **parameters: Array
    ) -> None:
        super().__init__(name, **parameters)
        self.stride, self.padding, self.groups = stride, padding, groups

    def _windows(self, height: int, width: int):
        """(output channel, output row and column, slice of the padded input) for every output unit."""
        c_out, c_in, kh, kw = self.parameters["weight"].shape
        for o in range(c_out):
            first = o // (c_out // self.groups) * c_in
            for i in range((height - kh) // self.stride + 1):
                for j in range((width - kw) // self.stride + 1):
                    top, left = i * self.stride, j * self.stride
                    yield o, i, j, np.s_[:, first : first + c_in, top : top + kh, left : left + kw]

    def forward(self, x: Array) -> Array:
        p, weight = self.padding, self.parameters["weight"]
        self.x = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
        height, width = self.x.shape[2:]
        rows = (height - weight.shape[2]) // self.stride + 1
        columns = (width - weight.shape[3]) // self.stride + 1
        y = np.zeros((len(x), len(weight), rows, columns))
        for o, i, j, window in self._windows(height, width):
            y[:, o, i, j] = (self.x[window] * weight[o]).sum((1, 2, 3)) + self.parameters["bias"][o]
        return y

    def backward(self, dy: Array) -> Array:
        weight, p = self.parameters["weight"], self.padding
        gradient, dx = np.zeros_like(weight), np.zeros_like(self.x)
        for o, i, j, window in self._windows(*self.x.shape[2:]):
            d = dy[:, o, i, j][:, None, None, None]
            gradient[o] += (d * self.x[window]).sum(0)
            dx[window] += d * weight[o]
        self.grads = {"weight": gradient, "bias": dy.sum((0, 2, 3))}
        return dx[:, :, p : dx.shape[2] - p, p : dx.shape[3] - p]


class Norm(Layer):
    """(x - mean) / sqrt(var + 1e-5) * gamma + beta, biased variance; statistics over `axes`, affine over `along`.

    Batch norm in training mode: axes = batch and space, along = 1. Layer norm: axes = along = the last one.
    """

    def __init__(self, name: str, axes: tuple[int, ...], along: int, **parameters: Array) -> None:
        super().__init__(name, **parameters)
        self.axes, self.along = axes, along

    def forward(self, x: Array) -> Array:
        self.shape = [1] * x.ndim
        self.shape[self.along] = x.shape[self.along]
        self.inverse = 1 / np.sqrt(x.var(self.axes, keepdims=True) + 1e-5)
        self.hat = (x - x.mean(self.axes, keepdims=True)) * self.inverse
        return self.hat * self.parameters["weight"].reshape(self.shape) + self.parameters[
            "bias"
        ].reshape(self.shape)

    def backward(self, dy: Array) -> Array:
        others = tuple(i for i in range(dy.ndim) if i != self.along % dy.ndim)
        self.grads = {"weight": (dy * self.hat).sum(others), "bias": dy.sum(others)}
        dhat = dy * self.parameters["weight"].reshape(self.shape)
        mean, projection = (v.mean(self.axes, keepdims=True) for v in (dhat, dhat * self.hat))
        return self.inverse * (dhat - mean - self.hat * projection)


class ReLU(Layer):
    def forward(self, x: Array) -> Array:
        self.positive = x > 0
        return x * self.positive

    def backward(self, dy: Array) -> Array:
        return dy * self.positive


class Tanh(Layer):
    def forward(self, x: Array) -> Array:
        self.y = np.tanh(x)
        return self.y

    def backward(self, dy: Array) -> Array:
        return dy * (1 - self.y**2)


class MaxPool(Layer):
    """2 x 2 windows, stride 2; the first maximum of a window gets its gradient."""

    def forward(self, x: Array) -> Array:
        n, c, height, width = x.shape
        self.shape, rows, columns = x.shape, height // 2, width // 2
        inner = x[:, :, : 2 * rows, : 2 * columns].reshape(n, c, rows, 2, columns, 2)
        windows = inner.transpose(0, 1, 2, 4, 3, 5).reshape(n, c, rows, columns, 4)
        self.choice = windows.argmax(-1)
        return windows.max(-1)

    def backward(self, dy: Array) -> Array:
        dx = np.zeros(self.shape)
        for n, c, i, j in np.ndindex(*dy.shape):
            down, right = divmod(int(self.choice[n, c, i, j]), 2)
            dx[n, c, 2 * i + down, 2 * j + right] += dy[n, c, i, j]
        return dx


class Flatten(Layer):
    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: Array) -> Array:
        return dy.reshape(self.shape)


class TokenMean(Layer):
    """[N, T, D] -> [N, D]."""

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        return x.mean(1)

    def backward(self, dy: Array) -> Array:
        return np.broadcast_to(dy[:, None] / self.shape[1], self.shape)


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Mean loss over all samples (and tokens), and e = (softmax - onehot) / M."""
    rows = logits.reshape(-1, logits.shape[-1])
    p = np.exp(rows - rows.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    picked = (np.arange(len(rows)), labels.reshape(-1))
    loss = -np.log(p[picked]).mean()
    p[picked] -= 1
    return float(loss), (p / len(rows)).reshape(logits.shape)


@dataclass
class Net:
    """Segments in forward order, each under the name of the site that ends it. The error is that at the output of
    `head`; what lies `above` (nothing, if the source is the model's output) learns by the true gradient."""

    segments: dict[str, list[Layer]]
    head: list[Layer]
    above: list[Layer] = field(default_factory=list)


@dataclass
class Known:
    """What a rule's equations may use at one site. `true` is backprop's signal for the control alone."""

    e: Array
    h: Array
    B: Array | None
    true: Array | None

    def rows(self):
        """(e_m: [C], index of h_m) for each sample, or for each token where `B` is shared by tokens."""
        lead = self.h.ndim if self.B is None else self.h.ndim - (self.B.ndim - 1)
        errors = self.e.reshape(*self.h.shape[:lead], -1)
        for index in np.ndindex(*self.h.shape[:lead]):
            yield errors[index], index


def direct(known: Known) -> Array:
    """delta h_m = sum_c e_mc B_c  (DFA, Nokland 2016; DKP uses the same)."""
    signal = np.zeros_like(known.h)
    for e, index in known.rows():
        for c in range(len(e)):
            signal[index] += e[c] * known.B[c]
    return signal


def reversed_direct(known: Known) -> Array:
    """delta h_m = -sum_c e_mc B_c."""
    return -direct(known)


def normalised_direct(known: Known) -> Array:
    """delta h_m = sum_c e_mc B_c / |B_c|  (GrAPE, Caillon et al. 2026)."""
    signal = np.zeros_like(known.h)
    for e, index in known.rows():
        for c in range(len(e)):
            signal[index] += e[c] * known.B[c] / np.sqrt((known.B[c] ** 2).sum())
    return signal


def sign_of_error(known: Known) -> Array:
    """delta h_m = (1/M) sum_c sign(e_mc) B_c, M samples or tokens  (sDFA, Frenkel et al. 2021)."""
    signal = np.zeros_like(known.h)
    rows = list(known.rows())
    for e, index in rows:
        for c in range(len(e)):
            signal[index] += (1 if e[c] > 0 else -1 if e[c] < 0 else 0) * known.B[c] / len(rows)
    return signal


def backprop(known: Known) -> Array:
    """delta h_l as the layers above it give it."""
    return known.true


def nothing(known: Known) -> None:
    """No signal: the segment stays as it is."""


def outer_product(known: Known) -> Array:
    """grad B_c = sum_m e_mc h_m  (DKP, Webster et al. 2020)."""
    gradient = np.zeros_like(known.B)
    for e, index in known.rows():
        for c in range(len(e)):
            gradient[c] += e[c] * known.h[index]
    return gradient


def towards_correlation(known: Known) -> Array:
    """grad B_c = B_c - sum_m e_mc h_m: a step of rate 1 - lambda is R <- lambda R + (1 - lambda) sum_m e_m h_m
    (EBD, Erdogan et al. 2025)."""
    return known.B - outer_product(known)


def centred_outer_product(known: Known) -> Array:
    """grad B_c = sum_m e_mc (h_m - mean h)."""
    indices = [index for _, index in known.rows()]
    mean = sum(known.h[index] for index in indices) / len(indices)
    gradient = np.zeros_like(known.B)
    for e, index in known.rows():
        for c in range(len(e)):
            gradient[c] += e[c] * (known.h[index] - mean)
    return gradient


@dataclass
class Step:
    """What one training step must give: None where there must be no gradient at all."""

    loss: float
    error: Array
    signals: dict[str, Array | None]
    parameters: dict[str, Array | None]
    feedback: dict[str, Array]


def step(net: Net, x: Array, labels: Array, equations, feedback: dict[str, Array]) -> Step:
    """One forward and backward pass of `net` under a rule's `equations` (`.signal` and `.feedback`)."""
    activities: dict[str, Array] = {}
    for name, layers in net.segments.items():
        activities[name] = x = _forward(layers, x)
    loss, error = cross_entropy(_forward(net.above, _forward(net.head, x)), labels)
    grads: dict[str, Array | None] = {}
    error = _backward(net.above, error, grads)
    true = _backward(net.head, error, grads)
    signals: dict[str, Array | None] = {}
    learned: dict[str, Array] = {}
    for name in reversed(net.segments):
        known = Known(error, activities[name], feedback.get(name), true)
        signals[name] = equations.signal(known)
        if equations.feedback is not None:
            learned[name] = equations.feedback(known)
        true = _backward(net.segments[name], signals[name], grads)
    return Step(loss, error, signals, grads, learned)


def _forward(layers: list[Layer], x: Array) -> Array:
    for layer in layers:
        x = layer.forward(x)
    return x


def _backward(
    layers: list[Layer], dy: Array | None, grads: dict[str, Array | None]
) -> Array | None:
    """Run the layers downwards and add up what each gives its parameters (a shared layer stands in twice)."""
    for layer in reversed(layers):
        if dy is None:
            grads.update({f"{layer.name}.{key}": None for key in layer.parameters})
            continue
        dy = layer.backward(dy)
        for key, gradient in layer.grads.items():
            before = grads.get(f"{layer.name}.{key}")
            grads[f"{layer.name}.{key}"] = gradient if before is None else before + gradient
    return dy
