"""YAML files: numbers as people write them, and no key twice."""

from __future__ import annotations

import operator
import random
from pathlib import Path

import pytest

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.arguments import parse
from feedbackward.experiment.config.files import parse_yaml, read_yaml
from feedbackward.experiment.config.schema import CompareCommand, TrainConfig
from feedbackward.experiment.training.building import make_rule

SPELLINGS = ("{m}e{e}", "{m}E{e}", "{m}.0e{e}", "{m}.e{e}", "+{m}e{e}", "-{m}e{e}", "{m}e+0{e}")


def test_every_spelling_of_a_number_is_that_number() -> None:
    """As Python's float reads it: the oracle."""
    draw = random.Random(0)
    for _ in range(500):
        spelling = draw.choice(SPELLINGS)
        exponent = draw.randint(0, 9) if "+0" in spelling else draw.randint(-12, 12)
        text = spelling.format(m=draw.randint(1, 999), e=exponent)
        value = parse_yaml(f"rates: {{lr: [{text}]}}")["rates"]["lr"][0]
        assert isinstance(value, float)
        assert value == float(text)


# what people write, and the number that they mean; None is no number
WRITTEN: dict[str, float | None] = {
    **{"5": 5, "+5": 5, "-0": 0, "010": 10, "08": 8, "0017": 17, "1_000": 1000, "0x10": 16},
    **{
        "0o17": 15,
        "0b101": 5,
        "'5'": 5,
        "1e3": 1e3,
        "1E-3": 1e-3,
        ".5": 0.5,
        "5.": 5.0,
        "-.5e1": -5.0,
    },
    **dict.fromkeys(["1:30", "12:30:45", "1:30.5", "2024-01-31", "12:30", "10%", "1/3", "0x"]),
    **dict.fromkeys(["inf", "nan", "\u0661", "\u22123", "yes", "off", "y", "{a: 1}", "5#", "="]),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_files_and_flags_read_the_same_number(text: str, tmp_path: Path) -> None:
    """A whole number, a number and a list of each, in a file and behind a flag: what it means, or refused."""
    means = WRITTEN[text]
    cases: list[tuple[type, str, bool, bool]] = [
        (TrainConfig, "seed", False, True),
        (TrainConfig, "forward.lr", False, False),
        (CompareCommand, "seeds", True, True),
        (CompareCommand, "search.lr", True, False),
    ]
    for kind, field, several, whole in cases:
        there = isinstance(means, int) or (means is not None and not whole)
        written = f"[{text}]" if several else text
        file = tmp_path / "c.yaml"
        file.write_text(yaml_of(field, written), encoding="utf-8")
        ways = [["--config", str(file)]]
        if "'" not in text:
            ways.append([f"--{field}={text}"])
        for arguments in ways:
            if not there:
                with pytest.raises(ConfigError, match=r"expected|valid YAML"):
                    parse(kind, arguments, "train" if kind is TrainConfig else "compare")
                continue
            config = parse(kind, arguments, "train" if kind is TrainConfig else "compare")
            found = operator.attrgetter(field)(config)
            assert found == ([means] if several else means)


def yaml_of(field: str, value: str) -> str:
    *outer, last = field.split(".")
    return "".join(f"{name}:\n  " for name in outer) + f"{last}: {value}\n"


@pytest.mark.parametrize(
    "text", ["2024-01-31", "1:30", "12:30:45", "=", "a=b", "2024-01-31 10:00:00"]
)
def test_what_looks_like_a_date_or_a_time_is_text(text: str) -> None:
    assert parse_yaml(f"out: {text}") == {"out": text}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_files_of_other_systems_are_read(encoding: str, end: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(end.join(["seed: 3", "out: 日本", ""]).encode(encoding))
    assert read_yaml(file) == {"seed": 3, "out": "日本"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "an alias .* stands within what it stands for"),
        ("rule_options: &a {x: {y: *a}}", "an alias .* stands within what it stands for"),
        (
            "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
            "stand for more than 100,000 values",
        ),
    ],
)
def test_values_without_an_end_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text)


def test_an_alias_used_twice_is_no_circle() -> None:
    assert parse_yaml("a: &a {x: [1]}\nb: [*a, *a]") == {"a": {"x": [1]}, "b": [{"x": [1]}] * 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed:", "c.yaml has no value for 'seed'"),
        ("forward:", "c.yaml has no value for 'forward'"),
        ("data: cifar10", "in .*c.yaml 'data' is 'cifar10'"),
        ("norm: 0", r"--norm: expected yes or no, not 0"),
        ("norm: y", r"--norm: expected yes or no, not y"),
        ("forward: {nesterov: 1}", r"--forward.nesterov: expected yes or no, not 1"),
        ("data: {name: 2024}", r"--data.name: expected a text, in quotes where it looks like"),
        ("recipe: no", "--recipe: expected a text, in quotes"),
        ("rule_options: [center]", "--rule-options: expected names and values"),
        ("forward: {momentum: .nan}", "forward.momentum is nan: it must be a finite number"),
        ("forward: {weight_decay: .inf}", "forward.weight_decay is inf: it must be a finite"),
        ("feedback: {clip: .nan}", "feedback.clip is nan: it must be a finite number"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_place(text, message, tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse(TrainConfig, ["--config", str(file)], "train").resolved()


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("dkp", "{center: n}", "the option 'center' of the rule 'dkp' is 'n': it must be true or false"),
        ("dkp", "{center: 1}", "'center' .* is 1: it must be true or false"),
        ("dkp", "{center: [true]}", r"'center' .* is \[True\]: it must be true or false"),
        ("dkp", "{center:}", "'center' .* is None: it must be true or false"),
        ("dkp", "{strength: '0.1'}", "'strength' .* is '0.1': it must be a number"),
        ("dkp", "{strength: .nan}", "'strength' .* is nan: it must be a number"),
        ("dkp", "{operator: 5}", "unknown feedback operator 5"),
        ("dkp", "{operator: {name: low_rank, rank: 2.0}}", "'rank' of the operator 'low_rank' is 2.0: it must be a whole number"),
    ],
)  # fmt: skip
def test_an_option_of_another_type_is_refused(rule: str, options: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_rule(rule, parse_yaml(options))


@pytest.mark.parametrize("text", ["1e", "e5", "12abc", "1e5x", "0x1e5z", "a1e5"])
def test_what_is_no_number_stays_text(text: str) -> None:
    assert parse_yaml(f"label: {text}") == {"label": text}


@pytest.mark.parametrize(
    "text",
    ["a: 1\na: 2", "b: {c: 1, c: 2}", "- {x: 1, y: 2, x: 3}", "a: {b: {c: 1}, b: 2}", "1: a\n1: b"],
)
def test_a_key_that_stands_twice_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="stands twice in one mapping"):
        read_yaml(file)


def test_merged_keys_may_be_overridden() -> None:
    text = "base: &b {lr: 1e-3, name: sgd}\nother: {<<: *b, lr: 2e-3}"
    assert parse_yaml(text)["other"] == {"lr": 2e-3, "name": "sgd"}


@pytest.mark.parametrize("text", ["a: [", "[" * 1000, "\x00", "a: !!python/name:os.system"])
def test_what_is_no_yaml_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no valid YAML"):
        parse_yaml(text)
