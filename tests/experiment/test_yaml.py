"""YAML files: numbers as people write them, and no key twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.files import parse_yaml, read_yaml

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


@pytest.mark.parametrize(
    "text", ["a: [", "a: 2001-99-99", "[" * 5000, "\x00", "a: !!python/name:os.system"]
)
def test_what_is_no_yaml_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no valid YAML"):
        parse_yaml(text)
