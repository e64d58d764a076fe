"""Every public name has an example, and every example in a docstring prints what it says."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest

import feedbackward as fb

PUBLIC = [fb, fb.errors, fb.operators, fb.parallel, fb.rules, fb.topologies]


def public_names() -> Iterator[tuple[str, object]]:
    """Modules, classes and functions. Aliases and dictionaries have no docstring of their own."""
    seen: set[int] = set()
    for module in PUBLIC:
        for name in module.__all__:
            thing = getattr(module, name)
            described = isinstance(thing, ModuleType | type) or inspect.isfunction(thing)
            if described and id(thing) not in seen:
                seen.add(id(thing))
                yield f"{module.__name__}.{name}", thing


def examples() -> list[doctest.DocTest]:
    names = [m.name for m in pkgutil.walk_packages(fb.__path__, "feedbackward.")]
    # adapters need packages of their own, see tests/clients
    left_out = ("__main__", "integrations.huggingface", "integrations.lightning")
    modules = [fb, *(import_module(name) for name in names if not name.endswith(left_out))]
    found = [test for m in modules for test in doctest.DocTestFinder().find(m, extraglobs={})]
    return [test for test in found if test.examples]


@pytest.mark.parametrize(("name", "thing"), [pytest.param(*p, id=p[0]) for p in public_names()])
def test_public_name_has_an_example(name: str, thing: object) -> None:
    text = thing.__doc__ or ""
    assert "Example:\n" in text, f"{name} needs an Example in its docstring"
    assert doctest.DocTestParser().get_examples(text), f"the Example of {name} has no code"


@pytest.mark.parametrize(("name", "thing"), [pytest.param(*p, id=p[0]) for p in public_names()])
def test_docstring_refers_to_public_names(name: str, thing: object) -> None:
    known = {full.rpartition(".")[2] for full, _ in public_names()}
    named = re.findall(r":(?:class|func):`([^`]*)`", thing.__doc__ or "")
    assert set(named) <= known, f"{name} refers to names that are not public"


@pytest.mark.whole
@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_example_in_docstring(example: doctest.DocTest) -> None:
    # a reader starts from an empty session, not from the names of our module
    example.globs = {}
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
