"""Passes that nobody asked for leave no trace, whatever habits a model has: inputs, attributes, parameters, random state."""

from __future__ import annotations

import copy
import io
import random
import re
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import feedbackward as fb
from feedbackward.model.state import training_mode
from feedbackward.rules import WeightMirror


class Cache:
    """An object of the user's own that a module keeps."""

    def __init__(self) -> None:
        self.seen, self.rows, self.last = 0, [torch.zeros(())], None

    def __repr__(self) -> str:
        return f"{self.seen}, {[row.item() for row in self.rows]}"


class Model(nn.Module):
    """Three layers; `habits` are what its forward does besides."""

    def __init__(self, habits: tuple[str, ...]) -> None:
        super().__init__()
        self.habits = habits
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.act, self.act2 = nn.Tanh(), nn.Tanh()
        self.count, self.state, self.cache, self.log = 0, None, Cache(), [1.0]
        self.window = deque([1.0, 2.0], maxlen=2)
        self.table: dict[str, Any] = {"mean": torch.ones(())}
        self.memory = torch.ones(6)
        self.rng, self.old_rng = np.random.default_rng(3), np.random.RandomState(3)
        self.own_random, self.draws = random.Random(3), torch.Generator().manual_seed(3)
        self.array = np.ones(6, dtype=np.float32)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        x = TAKES.get(self.habits[0], lambda batch: batch["x"])(batch)
        h = self.act(self.a(x))
        for habit in self.habits[1:]:
            h = KEEPS[habit](self, h)
        return self.c(self.act2(self.b(h)))


def pops(batch: dict[str, Any]) -> Tensor:
    batch.pop("labels")
    return batch.pop("x")


def adds_to_list(batch: dict[str, Any]) -> Tensor:
    batch["list"].append(batch["list"].pop(0) + 1)
    return batch["x"] * batch["list"][-1]


def in_place(batch: dict[str, Any]) -> Tensor:
    return batch["x"].sub_(1.0)


def reads(batch: dict[str, Any]) -> Tensor:
    return batch["x"] + len(batch["file"].read())


def counts_in_object(batch: dict[str, Any]) -> Tensor:
    batch["object"].seen += 1
    batch["object"].rows[0].add_(1)
    return batch["x"] * batch["object"].rows[0]


def iterates(batch: dict[str, Any]) -> Tensor:
    return batch["x"] * next(batch["iterator"])


TAKES: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "reads only": lambda batch: batch["x"],
    "pops": pops,
    "adds to a list": adds_to_list,
    "in place": in_place,
    "reads a file": reads,
    "counts in an object": counts_in_object,
    "iterates": iterates,
}


def keeps_state(m: Model, h: Tensor) -> Tensor:
    h = h if m.state is None else h + m.state[0]
    m.state = (h.detach().mean(0), 1)
    return h


def counts(m: Model, h: Tensor) -> Tensor:
    m.count += 1
    return h * m.count


def caches(m: Model, h: Tensor) -> Tensor:
    m.cache.seen += 1
    m.cache.rows.append(h.detach().mean())
    m.cache.last = h
    return h * m.cache.seen + m.cache.rows[-2]


def logs(m: Model, h: Tensor) -> Tensor:
    m.log.append(m.log[-1] + 1)
    m.window.append(m.window[-1] + 1)
    return h * m.log[-1] / m.window[0]


def tables(m: Model, h: Tensor) -> Tensor:
    m.table["mean"] = h.detach().mean() + m.table["mean"]
    m.table.setdefault("n", len(m.table))
    return h + m.table["mean"]


def remembers(m: Model, h: Tensor) -> Tensor:
    h = h * m.memory.clone()
    m.memory.mul_(0.9).add_(h.detach().mean(0))
    return h


def makes_attribute(m: Model, h: Tensor) -> Tensor:
    if not hasattr(m, "scale"):
        m.scale = 1.0 / (1.0 + h.detach().std())
    return h * m.scale


def draws(m: Model, h: Tensor) -> Tensor:
    own = m.rng.normal() + m.old_rng.normal() + m.own_random.random() + random.random()
    noise = torch.rand(h.shape, generator=m.draws) + np.random.random()
    return h + torch.rand_like(h) * own + noise


def fills_array(m: Model, h: Tensor) -> Tensor:
    h = h * torch.from_numpy(m.array.copy())
    m.array += 1
    return h


KEEPS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "keeps its state": keeps_state,
    "counts": counts,
    "caches in an object": caches,
    "logs": logs,
    "fills a table": tables,
    "remembers in place": remembers,
    "makes an attribute": makes_attribute,
    "draws": draws,
    "fills an array": fills_array,
}


def batch(rows: int = 5) -> dict[str, Any]:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    return {
        "x": x,
        "labels": torch.zeros(rows),
        "list": [1, 2],
        "file": io.BytesIO(b"ab"),
        "object": Cache(),
        "iterator": iter([2.0, 3.0]),
    }


def inputs(example: dict[str, Any]) -> str:
    """A batch as text; it must be whole."""
    file, iterator = example["file"].tell(), list(copy.copy(example["iterator"]))
    rest = {k: v for k, v in example.items() if k not in ("file", "iterator")}
    return f"{file} {iterator} {rest}"


def noted(model: Model, example: dict[str, Any]) -> str:
    """All that a pass may change, as text."""
    things = {k: v for k, v in vars(model).items() if k not in vars(nn.Module())}
    things |= {"example": inputs(example)}
    things |= {"rng": model.rng.bit_generator.state, "old": model.old_rng.get_state()[2:]}
    things |= {"own": model.own_random.getstate(), "draws": model.draws.get_state().sum()}
    things |= {"ambient": random.getstate(), "np": np.random.get_state()[2:]}
    things |= {"torch": torch.get_rng_state().double().sum(), "weights": model.state_dict()}
    things |= {"modes": [m.training for m in model.modules()]}
    text = "\n".join(f"{key}: {things[key]!r}" for key in sorted(things))
    return re.sub("0x[0-9A-Fa-f]+", "somewhere", text)


def loss(output: Tensor) -> Tensor:
    return output.square().mean()


HABITS = st.tuples(
    st.sampled_from(sorted(TAKES)),
    st.lists(st.sampled_from(sorted(KEEPS)), unique=True, max_size=3),
).map(lambda pair: (pair[0], *pair[1]))


@examples(25, 250)
@given(HABITS)
def test_attach_probe_and_phases_leave_no_trace(habits: tuple[str, ...]) -> None:
    model, example = Model(habits), batch()
    before = noted(model, example)
    learner = fb.attach(model, fb.DFA(), example=(example,))
    assert noted(model, example) == before
    fb.probe(learner, loss, (example,))
    assert noted(model, example) == before
    learner.detach()
    learner = fb.attach(model, WeightMirror(), example=(example,))
    phase = torch.get_rng_state()
    learner.feedback_step((example,))
    torch.set_rng_state(phase)
    assert noted(model, example) == before


@examples(25, 250)
@given(HABITS)
def test_training_runs_one_pass_per_batch_and_replay_gives_the_same(
    habits: tuple[str, ...],
) -> None:
    model = Model(habits)
    learner = fb.attach(model, fb.DFA(), example=(batch(3),))
    twin = copy.deepcopy(learner)
    random_state = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    for rows in (5, 6, 7):
        learner.backward((batch(rows),), loss)
    after = noted(model, batch())
    random.setstate(random_state[0])
    np.random.set_state(random_state[1])
    torch.set_rng_state(random_state[2])
    for rows in (5, 6, 7):
        example = batch(rows)
        twin.backward((example,), loss, schedule="replay")
        assert inputs(example) == inputs(batch(rows))
    for (name, p), q in zip(model.named_parameters(), twin.model.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-4, atol=1e-5, msg=name)
    assert noted(twin.model, batch()) == after


def test_weights_that_the_first_batch_sets_are_put_back() -> None:
    class Initialised(nn.Module):
        """Sets its own scale by the first batch, round autograd."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))
            self.ready = False

        def forward(self, h: Tensor) -> Tensor:
            if not self.ready:
                self.scale.data.copy_(1 / h.detach().std(0))
                self.ready = True
            return h * self.scale

    layer = Initialised()
    model = nn.Sequential(nn.Linear(4, 6), layer, nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    fb.attach(model, fb.DFA(), example=torch.randn(5, 4))
    assert torch.equal(layer.scale, torch.ones(6))
    assert not layer.ready


def test_a_stream_is_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

        def forward(self, stream: Any) -> Tensor:
            return self.net(next(stream))

    stream = (torch.randn(5, 4) for _ in range(3))
    with pytest.raises(fb.AttachError, match="hold a generator, which can be read once only"):
        fb.attach(Reads(), fb.DFA(), example=(stream,))
    assert len(list(stream)) == 3


def test_replay_one_by_one_refuses_what_it_would_change_twice() -> None:
    model = Model(("reads only", "counts"))
    learner = fb.attach(model, fb.DFA(), example=(batch(),))
    with pytest.raises(fb.AttachError, match="changes 'count' of the model"):
        learner.backward((batch(),), loss, schedule="replay", keep_inputs=True)


def test_the_mode_of_every_module_comes_back() -> None:
    """Whoever evaluates a model, or keeps some of its modules in another mode, finds them so."""
    model = Model(("batch",))
    model.eval()
    model.act.train()
    modes = {name: module.training for name, module in model.named_modules()}
    with training_mode(model):
        assert all(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == modes
    learner = fb.attach(model, fb.DFA(), example=({"x": torch.randn(4, 4)},))
    assert {name: module.training for name, module in model.named_modules()} == modes
    fb.count_cost(learner, ({"x": torch.randn(4, 4)},))
    assert {name: module.training for name, module in model.named_modules()} == modes
