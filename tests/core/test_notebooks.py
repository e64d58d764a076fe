"""What a notebook shows of a learner, a probe and a count: the texts' own cells, as HTML."""

from __future__ import annotations

from html.parser import HTMLParser

import torch
from torch import nn

import feedbackward as fb


class Cells(HTMLParser):
    """The texts of a table's cells; closing tags must match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


class Odd(nn.Sequential):
    pass


Odd.__name__ = "<b>Odd"


def made() -> tuple[fb.Learner, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    model = Odd(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    return fb.attach(model, fb.DKP.published(), example=x), x


def test_a_learner_is_its_plan() -> None:
    learner, _ = made()
    shown = Cells(learner._repr_html_())
    assert "b" not in shown.open
    for line in str(learner).splitlines()[1:]:
        for cell in line.strip().split("  "):
            assert not cell.strip() or cell.strip() in shown.cells
    title = next(c for c in shown.cells if " sites, " in c)
    assert str(learner).splitlines()[0][:137] in title
    assert title.startswith("DKP on <b>Odd: 2 sites, error of '4', feedback ")


def test_a_plan_says_its_size_first() -> None:
    x = torch.randn(8, 4)
    learner = fb.attach(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), fb.DKP(), example=x
    )
    assert str(learner).startswith("DKP on Sequential: 1 sites, error of '2', feedback 96 B; DKP(")


def test_a_probe_is_its_table() -> None:
    learner, x = made()
    probe = fb.probe(learner, lambda output: output.square().sum(), x)
    assert Cells(probe._repr_html_()).cells == words(str(probe))


def words(text: str) -> list[str]:
    for name in ("norm ratio", "B vs J"):
        text = text.replace(name, name.replace(" ", "~"))
    return [word.replace("~", " ") for word in text.split()]


def test_a_count_is_its_numbers() -> None:
    learner, x = made()
    cost = fb.count_cost(learner, x)
    shown = Cells(cost._repr_html_()).cells
    assert shown[shown.index("total") + 1] == f"{cost.total:,}"
    assert shown[shown.index("held, replay") + 1] == f"{cost.held['replay']:,}"
