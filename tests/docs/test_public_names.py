"""What the top level offers, and the names of 0.1.0 that it still knows."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

import feedbackward as fb

# as 0.1.0 listed them, with what each is called today where that differs
OLD = """
BP BRSF CDFA DDTP DFA DGL DKP DKPPC DRTP DSP DTP EBD FA FDFA FRSF IFA LRA OPERATORS PDFA PFA RULES
SDTP USF ActivationAlignment AttachError Binary BinaryDFA CheckpointError ConfigError Cost
DataError Dense DivergenceError Edge FeedbackError Flipped Frozen GrAPE Graph Han2020
InformationAlignment Kernel KernelDFA KolenPollack LayerKernel LayerShaped Learner Local LowRank
Mixed Operator ParameterAlignment Pass PerShape Phase Pooled Probe RecLRA RelayedKP
Rule Seeded SelfAlignment Shape Shared SharedDFA SignDFA SignSymmetry Site SiteAlignment SiteError
Source Sparse SparseDFA SymmetricAlignment WeightMirror Weights attach chain ladder modules
param_groups probe star step_in_backward Arc Lift Stale cost keep_norms
"""


def test_the_top_level_is_small() -> None:
    assert len(fb.__all__) <= 47
    assert len(set(fb.__all__)) == len(fb.__all__)
    assert all(hasattr(fb, name) for name in fb.__all__)


def test_a_public_name_is_that_of_its_module() -> None:
    """The names are looked up at their first use: each must be what a type checker is told."""
    source = Path(fb.__file__).read_text()
    told = ast.parse(source[source.index("if TYPE_CHECKING:") :]).body[0]
    assert isinstance(told, ast.If)
    names: set[str] = set()
    for line in told.body:
        assert isinstance(line, ast.ImportFrom)
        for alias in line.names:
            names.add(alias.name)
            full = f"{line.module}.{alias.name}"
            module = import_module(full if line.module == "feedbackward" else line.module)
            assert getattr(fb, alias.name) is getattr(module, alias.name, module)
    assert names == {*fb.__all__}


def test_every_rule_and_operator_is_in_its_module() -> None:
    for rule in fb.RULES.values():
        assert getattr(fb.rules, rule.__name__) is rule
    for operator in fb.operators.OPERATORS.values():
        assert getattr(fb.operators, operator.__name__) is operator


@pytest.mark.parametrize("name", [name for name in OLD.split() if name not in fb.__all__])
def test_an_old_name_works_and_says_the_new_one(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"feedbackward.{name} ") as caught:
        found = getattr(fb, name)
    home, new = re.search(r"write (.*)\.(\w+)\.$", str(caught[0].message)).groups()
    assert getattr(import_module(home), new) is found


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fb.nonsense
