"""Code of the user's own by name: modules and files."""

import sys

import pytest

from feedbackward.errors import ConfigError
from feedbackward.experiment.imported import imported


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        text = f"from beside_{folder} import WIDTH\n\nclass Net:\n    where = '{folder}'\n    width = WIDTH\n"
        # called as a module of the standard library is
        (tmp_path / folder / "json.py").write_text(text)
        (tmp_path / folder / f"beside_{folder}.py").write_text("WIDTH = 5\n")
    return tmp_path


def test_files_are_told_apart_by_their_folder(files):
    found = [imported(f"{files}/{folder}/json.py:Net", "net") for folder in ("one", "two")]
    assert [(net.where, net.width) for net in found] == [("one", 5), ("two", 5)]
    assert sys.modules["json"].loads("1") == 1


def test_a_file_is_read_once(files, monkeypatch):
    monkeypatch.chdir(files)
    first = imported("one/json.py:Net", "net")
    assert imported(f"{files}/one/json.py:Net", "net") is first
    assert sys.modules[first.__module__].Net is first


def test_a_module_and_a_name_within_a_class():
    assert imported("collections:OrderedDict.fromkeys", "net")("a") == {"a": None}


def test_what_the_file_raises_is_not_hidden_and_the_next_try_reads_it_again(files):
    file = files / "one" / "broken.py"
    file.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        imported(f"{file}:net", "net")
    file.write_text("net = 3\n")
    assert imported(f"{file}:net", "net") == 3


@pytest.mark.parametrize(
    "name", ["nowhere.py:net", "no_such_module_here:net", "json:absent", ":net", "json:", "a..b:c"]
)
def test_what_is_not_there_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"the rule '.*' could not be imported .*path/to/file.py"):
        imported(name, "rule")
