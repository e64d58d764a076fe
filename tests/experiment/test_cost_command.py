"""`feedbackward cost`: the tables, the files, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import feedbackward as fb
from feedbackward.cli import main
from feedbackward.experiment import nets
from feedbackward.rules import RULES

SMALL = ["small_cnn", "--size", "8", "--batch", "4"]


def cost(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = main(["cost", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def table(out: str, title: str) -> dict[str, dict[str, str]]:
    """The cells of a printed table, by rule and operator."""
    lines = out[out.index(title) :].splitlines()[2:]
    heads = re.split(r"\s{2,}", lines[0].strip())
    rows = until_blank(lines[2:])
    return {
        f"{cells[0]} {cells[1]}": dict(zip(heads, cells, strict=True))
        for cells in (re.split(r"\s{2,}", line.strip()) for line in rows)
    }


def until_blank(lines: list[str]) -> list[str]:
    return lines[: next((i for i, line in enumerate(lines) if not line.strip()), len(lines))]


def test_tables_json_and_plot(capsys: Any, tmp_path: Path) -> None:
    file, plot = tmp_path / "new" / "cost.json", tmp_path / "cost.png"
    code, out, err = cost(
        capsys,
        *SMALL,
        "--rules",
        "[dfa,dkp,fa]",
        "--operators",
        "[dense,sparse]",
        "--json",
        file,
        "--plot",
        plot,
    )
    assert (code, err) == (0, "")
    macs, held = table(out, "multiply-adds"), table(out, "bytes")
    names = ["bp -", "dfa dense", "dfa sparse", "dkp dense", "dkp sparse", "fa -"]
    assert list(macs) == list(held) == names
    x = torch.zeros(4, 3, 8, 8)
    learner = fb.attach(
        nets.build("small_cnn", (3, 8, 8), 10), fb.DKP(operator=fb.Dense()), example=x
    )
    expected = fb.count_cost(learner, x)
    results = json.loads(file.read_text())
    (rows,) = (model["rows"] for model in results["models"])
    found = next(row for row in rows if (row["rule"], row["operator"]) == ("dkp", "dense"))
    assert {key: found[key] for key in expected.as_dict()} == expected.as_dict() | {"rule": "dkp"}
    assert found["of_bp"] == found["total"] / rows[0]["total"]
    assert results["settings"]["models"] == ["small_cnn"]
    assert macs["dkp dense"]["of BP"] == f"{found['of_bp']:.2f}"
    assert float(macs["dkp dense"]["forward"]) == pytest.approx(expected.forward / 1e6, rel=0.01)
    assert held["dkp dense"]["replay"] == f"{expected.held['replay'] / 1e3:.1f} KB"
    assert held["fa -"]["replay"] == "-"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_log_is_not_wrapped(capsys: Any) -> None:
    """A row is a line, whatever the width of the terminal that is not there."""
    _, out, _ = cost(capsys, *SMALL, "--rules", "symmetric_alignment", "--operators", "dense")
    assert len(table(out, "multiply-adds")) == 2


@pytest.mark.nightly
def test_every_rule_has_its_row(capsys: Any) -> None:
    code, out, _ = cost(capsys, "mlp", "--size", "4", "--batch", "3")
    assert code == 0
    assert {name.split()[0] for name in table(out, "multiply-adds")} == {*RULES}
    assert re.search(r"^dsp: .*schedule", out, flags=re.M)


def test_an_operator_that_does_not_serve_a_site_says_where_and_why(
    capsys: Any, tmp_path: Path
) -> None:
    file = tmp_path / "cost.json"
    code, out, _ = cost(
        capsys, *SMALL, "--rules", "dfa", "--operators", "[pooled,dense]", "--json", file
    )
    assert code == 0
    assert set(table(out, "multiply-adds")["dfa pooled"].values()) == {"dfa", "pooled", "-"}
    (reason,) = re.findall(r"^dfa, pooled: (.*)$", out, flags=re.M)
    assert re.match(r"site '\S+': Pooled", reason)
    assert [row["refused"] for row in json.loads(file.read_text())["models"][0]["rows"]] == [
        None,
        reason,
        None,
    ]


@pytest.mark.nightly
def test_the_documentation_shows_what_is_printed(capsys: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text()
    (command,) = re.findall(r"^feedbackward cost (vgg16 (?!--measure).*)$", page, flags=re.M)
    (shown,) = re.findall(r"^```text\n(vgg16.*?)^```", page, flags=re.M | re.S)
    _, out, _ = cost(capsys, *shlex.split(command))
    printed = [line.rstrip() for line in out.splitlines()]
    assert printed[: len(shown.splitlines())] == shown.splitlines()


def test_options_of_rules_and_operators(capsys: Any) -> None:
    rules = "[{rule: dkp, label: centred, options: {center: true}}, {rule: dfa, options: {operator: {name: sparse, nonzeros: 2}}}]"
    code, out, _ = cost(capsys, *SMALL, "--rules", rules, "--sites", "published")
    assert code == 0
    assert list(table(out, "multiply-adds")) == ["bp -", "centred auto", "dfa sparse nonzeros=2"]


MODELS = """
import torch
from torch import nn

def plain(in_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_shape[0] * in_shape[1] * in_shape[2], 8), nn.ReLU(), nn.Linear(8, classes))

class Branch(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.low, self.high = nn.Linear(16, 8), nn.Linear(8, classes)

    def forward(self, x):
        h = self.low(x.flatten(1)).relu()
        return self.high(h if float(h.detach().sum()) >= 0 else -h)
"""


@pytest.mark.parametrize(("name", "low"), [("plain", 16), ("Branch", 16)])
def test_a_model_of_ones_own(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, low: int
) -> None:
    """The second branches on a value, which nothing has on the meta device."""
    module = f"models_of_cost_{name.lower()}"
    (tmp_path / f"{module}.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    options = [
        "--channels",
        "1",
        "--size",
        "4",
        "--batch",
        "5",
        "--classes",
        "3",
        "--json",
        "cost.json",
    ]
    code, _, err = cost(capsys, f"{module}:{name}", *options, "--rules", "dfa")
    assert (code, err) == (0, "")
    (backprop, direct) = json.loads((tmp_path / "cost.json").read_text())["models"][0]["rows"]
    assert backprop["forward"] == direct["forward"] == 5 * (low * 8 + 8 * 3)
    assert direct["feedback"] == 5 * 3 * 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name a model: feedbackward cost vgg16"),
        (["vgg61"], "unknown net 'vgg61'. Did you mean vgg6"),
        (["mlp", "mlp"], "models must name at least one, and none twice"),
        ([*SMALL, "--rules", "[dfa,dpk]"], "unknown rule 'dpk': did you mean 'dkp'"),
        (
            [*SMALL, "--operators", "[dence]"],
            "unknown feedback operator 'dence': did you mean 'dense'",
        ),
        ([*SMALL, "--operators", "[{name: sparse, ones: 2}]"], "has no option 'ones'"),
        ([*SMALL, "--rules", "[{rule: dkp, options: {centre: true}}]"], "has no option 'centre'"),
        ([*SMALL, "--batch", "0"], "batch is 0: it must be at least 1"),
        ([*SMALL, "--plot", "cost.gif"], "must end with .png"),
        (["small_cnn", "--size", "2"], "at least 6 x 6 px"),
        (
            ["vgg6", "--size", "2", "--batch", "1"],
            "Batch norm in training mode needs a batch of at least 2",
        ),
        ([*SMALL, "--sites", "[conv9]"], "the model has no module named 'conv9'"),
        ([*SMALL, "--classs", "3"], "did you mean --classes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(capsys: Any, arguments: list[str], says: str) -> None:
    code, out, err = cost(capsys, *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
