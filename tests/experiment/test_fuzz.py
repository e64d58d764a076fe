"""Fuzzing of what users hand in: config files, command lines and checkpoints. Nothing may end in a traceback.

The ordinary suite tries some hundred inputs; `NIGHTLY=1 pytest tests/experiment/test_fuzz.py` tries 10,000 of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import typing
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from examples import examples
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from feedbackward import cli
from feedbackward.errors import CheckpointError, FeedbackError
from feedbackward.experiment import nets
from feedbackward.experiment.config.arguments import SHIPPED, validated
from feedbackward.experiment.config.files import read_yaml, to_dict, write_yaml
from feedbackward.experiment.config.schema import CompareConfig, TrainConfig
from feedbackward.experiment.training import building, checkpoint
from feedbackward.experiment.training import train as train_module
from feedbackward.rules import RULES

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.floats(),
    st.sampled_from([2**63, -(2**70), 10**400, 1e-320, 1e308, float("nan"), float("inf"), -0.0]),
)
_WORDS = "bp dkp dfa mixed sgd adam none null true cpu fp16 replay 1e-3 0x10 2001-01-01 ~ << { [1 a:b : ..."
_WORDS += (
    " json:dumps no.such:Thing default published fashion-mini one-cycle blocks every-2 every-0"
)
WORDS = st.sampled_from([*_WORDS.split(), "", "é\0", "\ud800"])
SCALARS = st.one_of(NUMBERS, WORDS, st.booleans(), st.none(), st.text(max_size=8), st.dates())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(WORDS, st.integers()), inner, max_size=3),
    ),
    max_leaves=6,
)


def typed(hint: Any) -> st.SearchStrategy[Any]:
    """Values of the type that a field has, mostly in its range."""
    if dataclasses.is_dataclass(hint):
        return fields_of(typing.cast(type, hint))
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(parts)
    if typing.get_origin(hint) in (list, dict):
        return st.lists(typed(parts[0]), max_size=3) if len(parts) == 1 else st.just({})
    if parts:
        return st.one_of(*(typed(part) for part in parts))
    kinds: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.one_of(st.integers(1, 50), NUMBERS),
        float: st.one_of(st.floats(1e-3, 0.5), NUMBERS),
        str: st.one_of(st.sampled_from(["bp", "dfa", "default", "flip"]), WORDS),
    }
    return kinds.get(hint, st.none())


def fields_of(kind: type) -> st.SearchStrategy[dict[Any, Any]]:
    """Mappings with the true keys of a config; some values, and rarely a key, are of any kind."""
    own = {
        name: st.integers(0, 5).flatmap(lambda n, hint=hint: VALUES if n == 0 else typed(hint))
        for name, hint in typing.get_type_hints(kind).items()
    }
    if kind is TrainConfig:
        own["rule"] = st.one_of(st.sampled_from(sorted(RULES)), own["rule"])
        options = st.dictionaries(st.sampled_from(OPTIONS), VALUES, max_size=2)
        own["rule_options"] = st.one_of(options, VALUES)
    known = st.lists(st.sampled_from(sorted(own)), max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: own[name] for name in names})
    )
    rarely = st.integers(0, 9).flatmap(
        lambda n: st.dictionaries(WORDS, VALUES, max_size=1) if n == 0 else st.just({})
    )
    return st.builds(lambda one, other: {**one, **other}, known, rarely)


OPTIONS = sorted(
    {name for rule in RULES.values() for name in getattr(rule, "__dataclass_fields__", {})}
)


def dumped(values: Any) -> bytes:
    return yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")


MARKS = [b": ", b"- ", b"{", b"]", b"&a ", b"*a ", b"\t", b"!!", b"'"]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A shipped config with some of its bytes changed."""
    text = draw(st.sampled_from(sorted(SHIPPED.glob("*.yaml")))).read_bytes()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.integers(0, 12))
        put = draw(st.one_of(st.binary(max_size=4), st.sampled_from(MARKS)))
        text = text[:at] + put + text[at + cut :]
    return text


def files(kind: type) -> st.SearchStrategy[bytes]:
    return st.one_of(
        fields_of(kind).map(dumped), VALUES.map(dumped), mutated(), st.binary(max_size=60)
    )


def refused_or_read(command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The command line answers 0 (the config is good) or 2 with one line; any other exception is a defect."""
    capsys.readouterr()
    try:
        code = cli.main([command, *arguments])
    except SystemExit as stop:  # --help
        code = int(stop.code or 0)
    written = capsys.readouterr().err
    assert code in (0, 2), written
    lines = [line for line in written.splitlines() if "warning:" not in line]
    assert len(lines) == (code == 2), written
    assert "Traceback" not in written


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands stop where training would begin: once rule and device are made."""

    def train(config: TrainConfig, *_: Any, **__: Any) -> dict[str, Any]:
        config = config.resolved()
        building.make_rule(config.rule, config.rule_options)
        building.find_device(config.device)
        return {"test_accuracy": 0.0}

    monkeypatch.setattr(train_module, "train", train)


def read(kind: type, text: bytes, folder: str) -> Any:
    """What a command makes of a config file before it trains."""
    file = Path(folder) / "c.yaml"
    file.write_bytes(text)
    config = validated(kind, read_yaml(file), str(file)).resolved()
    for rule, options in parts_of(config):
        building.make_rule(rule, options)
    if config.model not in nets.NETS:
        nets.build(config.model, (3, 32, 32), 10)
    return config


def parts_of(config: Any) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(config, TrainConfig):
        return [(config.rule, config.rule_options)]
    return [(entry.rule, entry.options) for entry in config.entries()]


@pytest.mark.parametrize("kind", [TrainConfig, CompareConfig])
def test_a_config_is_read_or_refused(kind: type, tmp_path: Path) -> None:
    """Refused in a sentence; what is read is read again from its own text."""
    good = 0

    @examples(120, 10_000)
    @given(text=files(kind))
    @example(text=b"parallel: {timeout: 1" + b"0" * 400 + b"}")
    @example(text=b"rule_options: {5: 1}")
    @example(text=b"rule: ':'")
    @example(text=b"rules: [dkp, {rule: ':'}]")
    def check(text: bytes) -> None:
        nonlocal good
        try:
            config = read(kind, text, str(tmp_path))
        except FeedbackError:
            return
        good += 1
        assert same(read(kind, write_yaml(config).encode(), str(tmp_path)), config)

    check()
    assert good > 3


def same(one: Any, other: Any) -> bool:
    """But for what concerns one invocation only; by `repr`, because NaN is not equal to itself."""
    return repr(to_dict(one)) == repr(to_dict(other))


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_command_line_answers_in_a_line(
    command: str, capsys: pytest.CaptureFixture[str], no_training: None, tmp_path: Path
) -> None:
    kind = {"train": TrainConfig, "compare": CompareConfig}[command]
    stop = ["--dry-run"] if command == "compare" else []

    @examples(12, 2000)
    @given(
        text=files(kind), flag=st.sampled_from(FLAGS), value=st.one_of(WORDS, st.text(max_size=8))
    )
    def check(text: bytes, flag: str, value: str) -> None:
        file = tmp_path / "c.yaml"
        file.write_bytes(text)
        refused_or_read(
            command,
            [f"--config={file}", *stop, "--out", str(tmp_path / "out"), flag, value],
            capsys,
        )

    check()


FLAGS = [
    "--rule",
    "--lr",
    "--data",
    "--epochs",
    "--forward.name",
    "--rule_options",
    "--sites",
    "--no-norm",
]
FLAGS += [
    "--threads=",
    "--seed",
    "",
    "-x",
    "--",
    "--forward",
    "--rule_options.center",
    "--resume",
    "--device",
]


# checkpoints

STATE = {
    "data": {"name": "made", "classes": ["a", "b"], "mean": [0.5]},
    "position": {"epoch": 3, "loss_sum": float("inf")},
    "model": {"w": torch.arange(12.0).view(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)},
    "random": (1, (2, None), torch.arange(5, dtype=torch.uint8)),
}


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A whole checkpoint with bytes changed, cut out, put in or cut off."""
    data = draw(st.just(WHOLE))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        cut = draw(st.sampled_from([0, 1, 1, 1, 8, len(data)]))
        data = data[:at] + draw(st.binary(max_size=9)) + data[at + cut :]
    return data


def written(state: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "c", state)
        return (Path(folder) / "c").read_bytes()


WHOLE = written(STATE)


@st.composite
def foreign(draw: st.DrawFn) -> bytes:
    """A safetensors file of another program, some of which say that they are ours, with a true checksum."""
    names = draw(st.lists(st.text(max_size=5), max_size=2, unique=True))
    tensors = {name: torch.zeros(draw(st.integers(0, 3))) for name in names}
    leaf = st.one_of(
        st.none(),
        st.integers(),
        st.text(max_size=5),
        st.sampled_from(["tensor", "dict", "tuple", "float"]),
    )
    kinds = st.sampled_from(["tensor", "dict", "tuple", "float", "other"])
    nested = st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(kinds, inner, max_size=2)
        ),
        max_leaves=8,
    )
    body = draw(st.one_of(nested.map(json.dumps), st.text(max_size=20), st.just("[" * 3000)))
    metadata = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "state": body}
    metadata["crc"] = str(crc(body, tensors))
    for key in draw(st.lists(st.sampled_from(sorted(metadata)), max_size=1)):
        del metadata[key]
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "c", metadata)
        return (Path(folder) / "c").read_bytes()


def crc(body: str, tensors: dict[str, torch.Tensor]) -> int:
    """The checksum as the format says: over the body, then each tensor's name, shape, type and bytes, by name."""
    value = zlib.crc32(body.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        value = zlib.crc32(f"{name} {list(tensors[name].shape)} float32".encode(), value)
        value = zlib.crc32(tensors[name].numpy().tobytes(), value)
    return value


@examples(200, 10_000)
@given(data=st.one_of(damaged(), st.binary(max_size=80)))
def test_a_damaged_checkpoint_is_whole_or_refused(data: bytes) -> None:
    """Never another state."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "c").write_bytes(data)
        try:
            found = checkpoint.load(Path(folder) / "c")
        except CheckpointError:
            return
    assert repr(found) == repr(STATE)


@examples(150, 10_000)
@given(data=foreign())
def test_a_foreign_checkpoint_is_read_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "c").write_bytes(data)
        with contextlib.suppress(CheckpointError):
            checkpoint.load(Path(folder) / "c")
