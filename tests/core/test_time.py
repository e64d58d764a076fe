"""Cuts in time: every step's state is cut and gets the error of its own step, through one B."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import feedbackward as fb

N, T, IN, HIDDEN, OUT = 3, 6, 4, 5, 2
KINDS = {
    "tanh": lambda layers=1, **k: nn.RNN(IN, HIDDEN, layers, batch_first=True, **k),
    "relu": lambda layers=1, **k: nn.RNN(
        IN, HIDDEN, layers, nonlinearity="relu", batch_first=True, **k
    ),
    "gru": lambda layers=1, **k: nn.GRU(IN, HIDDEN, layers, batch_first=True, **k),
    "lstm": lambda layers=1, **k: nn.LSTM(IN, HIDDEN, layers, batch_first=True, **k),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Tagger(nn.Module):
    """A recurrent layer and a head: [N, T, in] -> [N, T, out], or [N, out] of the last step."""

    def __init__(self, rnn: nn.Module, last: bool = False) -> None:
        super().__init__()
        self.rnn, self.head, self.last = rnn, nn.Linear(HIDDEN, OUT), last

    def forward(self, x: Tensor, state=None) -> Tensor:
        h, _ = self.rnn(x) if state is None else self.rnn(x, state)
        return self.head(h[:, -1] if self.last else h)


class Looped(nn.Module):
    """A user's own loop over a cell."""

    def __init__(self, cell: nn.Module, last: bool = False) -> None:
        super().__init__()
        self.cell, self.head, self.last = cell, nn.Linear(HIDDEN, OUT), last

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return (
            self.head(outputs[-1]) if self.last else torch.stack([self.head(h) for h in outputs], 1)
        )


def inputs(steps: int = T) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, steps, IN, dtype=torch.float64), torch.randint(OUT, (N, steps))


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), (y if output.dim() == 3 else y[:, -1]).flatten())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, grad in a.items():
        torch.testing.assert_close(grad, b[name], rtol=1e-9, atol=1e-12, msg=name)


@every_kind
@pytest.mark.parametrize("layers", [1, 2])
def test_unrolled_is_the_layer(kind, layers) -> None:
    """Values, final states, gradients and keys, also from a state and packed."""
    torch.manual_seed(0)
    rnn = KINDS[kind](layers).double()
    unrolled = fb.unroll(copy.deepcopy(rnn))
    assert list(unrolled.state_dict()) == list(rnn.state_dict())
    x, _ = inputs()
    given = torch.randn(layers, N, HIDDEN, dtype=torch.float64)
    states = [None, (given, given.flip(0)) if kind == "lstm" else given]
    lengths = torch.tensor([4, 6, 1])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    for sequence, state in [
        (x, states[0]),
        (x, states[1]),
        (packed, states[0]),
        (packed, states[1]),
    ]:
        for module in (rnn, unrolled):
            module.zero_grad()
        (a, a_end), (b, b_end) = rnn(sequence, state), unrolled(sequence, state)
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(b_end, a_end, rtol=1e-10, atol=1e-12)
        for out in (a, b):
            (out.data if sequence is packed else out).square().sum().backward()
        same(gradients(rnn), gradients(unrolled))


def test_time_first_is_the_layer_too() -> None:
    rnn = nn.GRU(IN, HIDDEN).double()
    x = inputs()[0].transpose(0, 1)
    torch.testing.assert_close(fb.unroll(rnn)(x), rnn(x))


@every_kind
def test_naive_oracle(kind) -> None:
    """Every step by itself: autograd through one step only, from `e_t B` at its state."""
    torch.manual_seed(0)
    model = Tagger(fb.unroll(KINDS[kind]().double())).double()
    x, y = inputs()
    learner = fb.attach(model, fb.DFA(), example=x, sites=["rnn.steps.0"])
    output = learner(x)
    loss_of(output, y).backward()
    found = gradients(model)
    (B,) = learner.feedback.buffers()
    assert B.shape == (OUT, HIDDEN)
    plain = {"tanh": nn.RNNCell, "relu": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}[kind]
    options = {"nonlinearity": kind} if kind in ("tanh", "relu") else {}
    cell = plain(IN, HIDDEN, **options).double()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in model.rnn.state_dict().items()})
    state, expected = None, {}
    for t in range(T):
        state = cell(x[:, t], state)
        h = state[0] if kind == "lstm" else state
        e = (output[:, t].softmax(-1) - F.one_hot(y[:, t], OUT)) / (N * T)
        for name, g in zip(
            [n for n, _ in cell.named_parameters()],
            torch.autograd.grad(h, list(cell.parameters()), (e @ B.double()).detach()),
            strict=True,
        ):
            expected[name] = expected.get(name, 0) + g
        for name, g in (("weight", e.t() @ h), ("bias", e.sum(0))):
            expected["head." + name] = expected.get("head." + name, 0) + g.detach()
        state = tuple(s.detach() for s in state) if kind == "lstm" else state.detach()
    renamed = {k.removeprefix("rnn.").removesuffix("_l0"): v for k, v in found.items()}
    assert renamed.keys() == expected.keys()
    for name, grad in renamed.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-9, msg=name)
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm"])
def test_a_loop_over_a_cell_is_the_unrolled_layer(kind, last) -> None:
    torch.manual_seed(0)
    rnn = KINDS[kind]().double()
    cell = {"tanh": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}[kind](IN, HIDDEN).double()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in rnn.state_dict().items()})
    a, b = Tagger(fb.unroll(rnn), last).double(), Looped(cell, last).double()
    b.head.load_state_dict(a.head.state_dict())
    x, y = inputs()
    found = []
    for model, site in ((a, "rnn.steps.0"), (b, "cell")):
        learner = fb.attach(model, fb.DKP(), example=x, sites=[site], feedback_dtype=torch.float64)
        B = next(learner.feedback.parameters())
        torch.manual_seed(3)
        with torch.no_grad():
            B.normal_()
        loss_of(learner(x), y).backward()
        renamed = {
            n.replace("rnn.", "cell.").removesuffix("_l0"): g for n, g in gradients(model).items()
        }
        found.append(renamed | {"B": B.grad})
    same(*found)


def _linear(W: Tensor) -> nn.Module:
    """A linear recurrent network h_t = x_t U + h_{t-1} W."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.back = (
                nn.Linear(IN, HIDDEN, bias=False),
                nn.Linear(HIDDEN, HIDDEN, bias=False),
            )
            self.back.weight.data.copy_(W)

        def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
            return self.into(x) if h is None else self.into(x) + self.back(h)

    return Linear()


def _with_jacobian(model: Looped, x: Tensor) -> fb.Learner:
    learner = fb.attach(model, fb.DFA(), example=x, sites=["cell"], feedback_dtype=torch.float64)
    with torch.no_grad():
        next(learner.feedback.buffers()).copy_(model.head.weight)
    return learner


def test_with_the_true_jacobian_it_is_backprop_through_time() -> None:
    """One answer at the end, and a state that is carried on as it is: the Jacobian of every step is the head's weight."""
    torch.manual_seed(0)
    model = Looped(_linear(torch.eye(HIDDEN)).double(), last=True).double()
    x, y = inputs()
    loss_of(model(x), y).backward()
    exact = gradients(model)
    model.zero_grad()
    learner = _with_jacobian(model, x)
    (edge,) = learner.graph.edges
    assert (edge.repeats, edge.leading, edge.site_shape) == (1, 1, (HIDDEN,))
    loss_of(learner(x), y).backward()
    same(gradients(model), exact)


def test_with_a_loss_per_step_it_is_backprop_through_no_time() -> None:
    """B the head's weight: the gradient of the loop whose state is detached at every step; without a recurrence, BPTT."""
    for W in (torch.randn(HIDDEN, HIDDEN), torch.zeros(HIDDEN, HIDDEN)):
        torch.manual_seed(0)
        model = Looped(_linear(W).double()).double()
        x, y = inputs()
        cell, h, total = model.cell, None, 0.0
        for t in range(T):
            h = cell(x[:, t], None if h is None else h.detach())
            total = total + F.cross_entropy(model.head(h), y[:, t]) / T
        total.backward()
        truncated = gradients(model)
        model.zero_grad()
        loss_of(_with_jacobian(model, x)(x), y).backward()
        same(gradients(model), truncated)
        if not W.any():
            model.zero_grad()
            loss_of(model(x), y).backward()
            exact = gradients(model)
            same(
                {k: v for k, v in exact.items() if "back" not in k},
                {k: v for k, v in truncated.items() if "back" not in k},
            )


@every_kind
def test_pieces_add_up_to_the_whole(kind) -> None:
    """No gradient crosses a step, so a sequence in pieces gives the gradient of the whole: memory need not grow with it."""
    torch.manual_seed(0)

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = fb.unroll(KINDS[kind](2).double()), nn.Linear(HIDDEN, OUT)

        def forward(self, x, state=None):
            h, state = self.rnn(x, state)
            return self.head(h), state

    model = Stream().double()
    x, y = inputs()
    learner = fb.attach(
        model, fb.DFA(), example=x, sites=["rnn.steps.0", "rnn.steps.1"], output=lambda o: o[0]
    )
    F.cross_entropy(learner(x)[0].flatten(0, 1), y.flatten(), reduction="sum").backward()
    whole = gradients(model)
    model.zero_grad()
    state = None
    for piece, labels in zip(x.split(2, 1), y.split(2, 1), strict=True):
        output, state = learner(piece, state)
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        F.cross_entropy(output.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    same(gradients(model), whole)


def test_another_number_of_steps() -> None:
    model = Looped(nn.GRUCell(IN, HIDDEN)).double()
    learner = fb.attach(model, fb.DFA(), example=inputs()[0], sites=["cell"])
    for steps in (1, 3, 9):
        x, y = inputs(steps)
        loss_of(learner(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_padding_gets_no_signal() -> None:
    """Masked losses, and packed sequences with one answer each: as if every sequence were alone."""
    torch.manual_seed(0)

    class Packed(Tagger):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            out, end = self.rnn(packed)
            if self.last:
                return self.head(end[-1])
            return self.head(pad_packed_sequence(out, batch_first=True)[0])

    lengths = torch.tensor([4, 6, 2])
    for last in (False, True):
        model = Packed(fb.unroll(KINDS["gru"]().double()), last).double()
        x, y = inputs()
        learner = fb.attach(
            model, fb.DKP(center=False, whiten=False), example=(x, lengths), sites=["rnn.steps.0"]
        )
        B = next(learner.feedback.parameters())
        with torch.no_grad():
            B.normal_()

        def losses(output: Tensor, y: Tensor, lengths: Tensor, last: bool = last) -> Tensor:
            if last:
                return F.cross_entropy(output, y[:, 0], reduction="sum")
            mask = torch.arange(output.shape[1]) < lengths.unsqueeze(1)
            return F.cross_entropy(output[mask], y[:, : output.shape[1]][mask], reduction="sum")

        losses(learner(x, lengths), y, lengths).backward()
        together = gradients(model) | {"B": B.grad.clone()}
        model.zero_grad()
        B.grad = None
        for n, length in enumerate(lengths):
            alone = x[n : n + 1, :length], lengths[n : n + 1]
            losses(learner(*alone), y[n : n + 1], alone[1]).backward()
        same(together, gradients(model) | {"B": B.grad})


def test_layer_granularity_keeps_backprop_through_time_inside() -> None:
    """A recurrent layer's output sequence is one site: the gradient inside is BPTT from `e_t B` at every step."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.GRU(IN, HIDDEN, batch_first=True)
            self.second, self.head = (
                nn.LSTM(HIDDEN, HIDDEN, batch_first=True),
                nn.Linear(HIDDEN, OUT),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)[0])[0])

    model = Two().double()
    x, y = inputs()
    learner = fb.attach(model, fb.DFA(), example=x, sites=["first", "second"])
    output = learner(x)
    loss_of(output, y).backward()
    found = gradients(model)
    model.zero_grad()
    e = (output.softmax(-1) - F.one_hot(y, OUT)).detach() / (N * T)
    h = model.first(x)[0]
    k = model.second(h.detach())[0]
    for site, activity in (("first", h), ("second", k)):
        (edge,) = (edge for edge in learner.graph.edges if edge.site.name == site)
        assert edge.leading == 2
        activity.backward(e @ learner.feedback_of(edge).double())
    loss_of(model.head(k.detach()), y).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-9, msg=name)


def test_local_losses_in_time() -> None:
    model = Looped(nn.GRUCell(IN, HIDDEN)).double()
    x, y = inputs()
    learner = fb.attach(model, fb.DGL(), example=x, sites=["cell"])
    learner.target(y)
    loss_of(learner(x), y).backward()
    assert all(p.grad is not None for p in learner.parameters())


class Backwards(Looped):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1)).flip(1)


class Ahead(Looped):
    """Step t of the output is what call t + 1 makes, so that the last step alone is in its order."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return torch.cat([out[:, 1:], out[:, -1:]], 1)


def test_refused() -> None:
    x, _ = inputs()
    for kind in (Backwards, Ahead):
        with pytest.raises(fb.AttachError, match=r"not the steps of the source .* in their order"):
            fb.attach(kind(nn.GRUCell(IN, HIDDEN)).double(), fb.DFA(), example=x, sites=["cell"])
    model = Looped(nn.LSTMCell(IN, HIDDEN)).double()
    with pytest.raises(fb.AttachError, match=r"called many times"):
        fb.attach(model, fb.rules.FDFA(), example=x, sites=["cell"])
    learner = fb.attach(model, fb.DFA(), example=x, sites=["cell"])
    with pytest.raises(fb.AttachError, match=r"in pieces"):
        learner.backward(x, lambda out: out.square().mean(), schedule="replay")
    with pytest.raises(fb.FeedbackError, match=r"called many times"):
        fb.probe(learner, lambda out: out.square().mean(), x)
    for rnn in (nn.GRU(2, 3, bidirectional=True), nn.LSTM(2, 3, proj_size=2), nn.Linear(2, 3)):
        with pytest.raises(fb.FeedbackError, match="unroll"):
            fb.unroll(rnn)
