"""The report: files that are whole, valid and safe."""

import json
import math
import random
import re
from html.parser import HTMLParser

import pytest

from feedbackward.errors import FeedbackError
from feedbackward.experiment.report.numbers import size
from feedbackward.experiment.report.report import write_report
from feedbackward.experiment.report.summary import conclusion, summarise
from feedbackward.experiment.report.tables import detailed as table

SITES = [f"features.act{i}" for i in range(1, 8)] + ["classifier.act1"]
LEVEL = {"bp": 88.0, "dkp": 84.0, "dfa": 79.0, "frozen": 66.0}
ANGLE = {"bp": 0.0, "dkp": 62.0, "dfa": 78.0}


def make_run(rule, seed, epochs=6, sites=SITES):
    """A finished run with plausible curves and angles: DKP's improve with training, most near the output."""
    rng = random.Random(f"{rule} {seed}")
    rise = [
        LEVEL[rule] * (1 - 0.45 * math.exp(-e / 1.8)) + rng.gauss(0, 0.5)
        for e in range(1, epochs + 1)
    ]
    history = [
        {
            "epoch": epoch,
            "train_loss": 2.2 - accuracy / 48,
            "train_accuracy": accuracy + 1.5,
            "validation_loss": 2.25 - accuracy / 48,
            "validation_accuracy": accuracy,
            "seconds": 3.1,
        }
        for epoch, accuracy in enumerate(rise, 1)
    ]
    return {
        "seed": seed,
        "status": "done",
        "message": None,
        "test_accuracy": rise[-1] - 0.6,
        "validation_accuracy": rise[-1],
        "seconds": 19.4,
        "epochs": history,
        "alignment": [make_probe(rule, epoch, epochs, rng, sites) for epoch in range(epochs + 1)],
    }


def make_probe(rule, epoch, epochs, rng, sites):
    """Every site and two tensors per site; DFA's first site sinks to the numerical floor at the end."""

    def entry(depth, floor=False):
        learned = {"dkp": 26, "dfa": 9}.get(rule, 0) * epoch / epochs
        angle = (
            0.0 if rule == "bp" else 90 - learned - 28 * depth * min(epoch, 3) / 3 + rng.gauss(0, 2)
        )
        norm = 3e-8 if floor else 10 ** (-3.5 + 1.5 * depth)
        cosine = math.cos(math.radians(angle))
        return {
            "cosine": cosine,
            "angle": angle,
            "norm_ratio": 1.2,
            "sign_agreement": 0.6,
            "bp_norm": norm,
        }

    entries, tensors = {}, {}
    for index, site in enumerate(sites if rule != "frozen" else []):
        depth = index / len(sites)
        floor = rule == "dfa" and index == 0 and epoch >= epochs - 1
        jacobian = 0.7 * depth * epoch / epochs if rule == "dkp" else None
        entries[site] = {**entry(depth, floor), "jacobian_cosine": jacobian, "readout": None}
        for kind in ("weight", "bias"):
            tensors[f"{site.replace('act', 'conv')}.{kind}"] = entry(depth)
    return {"epoch": epoch, "sites": entries, "parameters": tensors}


RATIOS = {"bp": (1.0, 1.0), "dkp": (0.85, 0.97), "dfa": (0.79, 0.91), "frozen": (0.41, 0.38)}


def make_rule(rule, seeds, epochs, sites):
    step, peak = RATIOS[rule]
    return {
        "rule": rule,
        "label": "Frozen" if rule == "frozen" else rule.upper(),
        "options": {},
        "rates": {"lr": 0.02},
        "feedback_bytes": 1_843_200 if rule in ("dkp", "dfa") else 0,
        "cost": {"backward_steps": len(sites) + 1 if rule == "bp" else 1},
        "step_ms": 41.0 * step,
        "step_ratio": step,
        "peak_bytes": int(9e7 * peak),
        "peak_ratio": peak,
        "runs": [make_run(rule, seed, epochs, sites) for seed in range(seeds)],
    }


def make_results(rules=("bp", "dkp", "dfa", "frozen"), seeds=3, epochs=6, sites=SITES):
    """Results as `feedbackward compare` hands them over, the same on every call."""
    return {
        "version": 1,
        "title": "Fashion-MNIST, VGG-11: backprop and direct feedback",
        "command": f"feedbackward compare --rules {','.join(rules)} --seeds {seeds} --train.epochs {epochs}",
        "created": "2025-11-23T12:00:00+00:00",
        "environment": {
            "python": "3.12.1",
            "torch": "2.13.0",
            "device": "cpu",
            "git_commit": "0123abc",
        },
        "config": {
            "train": {"epochs": epochs, "batch": 100},
            "data": {"name": "fashion-mnist", "crop": True},
        },
        "data": {
            "name": "Fashion-MNIST",
            "train": 4000,
            "validation": 1000,
            "test": 2000,
            "classes": 10,
        },
        "model": {"name": "vgg11", "parameters": 9_231_114},
        "sites": list(sites),
        "rules": [make_rule(rule, seeds, epochs, sites) for rule in rules],
    }


def small(**accuracies):
    """Results with nothing but test accuracies of seeds 0, 1, ... per rule; None for a diverged run."""
    rules = [
        {
            "rule": rule,
            "label": rule.upper(),
            "runs": [
                {
                    "seed": seed,
                    "status": "diverged" if value is None else "done",
                    "test_accuracy": value,
                }
                for seed, value in enumerate(values)
            ],
        }
        for rule, values in accuracies.items()
    ]
    return {"version": 1, "rules": rules}


def with_other_sites(results, rule, names):
    """The rule's probes under other names of its sites, as a chain's are."""
    (ours,) = (r for r in results["rules"] if r["rule"] == rule)
    for probe in (probe for run in ours["runs"] for probe in run["alignment"]):
        probe["sites"] = dict(zip(names, probe["sites"].values(), strict=True))
    return results


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that every element is closed in order."""

    VOID = frozenset(
        {"meta", "link", "img", "br", "path", "use", "rect", "image", "circle", "line", "hr"}
    )

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The files of the full fixture."""
    return write_report(make_results(), tmp_path_factory.mktemp("report"))


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (0, "none"), (12, "12 B"), (1_843_200, "1.84 MB"), (999_600, "1 MB")],
)
def test_sizes(count, text):
    assert size(count) == text


def test_four_whole_files_and_nothing_else(report):
    assert set(report) == {"results.json", "report.md", "report.html", "picture.png"}
    folder = report["report.html"].parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(report)
    assert report["picture.png"].read_bytes().startswith(b"\x89PNG")
    saved = json.loads(report["results.json"].read_text())
    assert {key: saved[key] for key in make_results()} == make_results()
    assert saved["summary"] == summarise(make_results())


def test_the_saved_results_make_the_same_report(report, tmp_path):
    again = write_report(json.loads(report["results.json"].read_text()), tmp_path)
    for name in ("report.html", "report.md"):
        assert again[name].read_text() == report[name].read_text()


def test_the_page_is_well_formed_and_loads_nothing(report):
    text = report["report.html"].read_text()
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.elements}
    for _, attrs in page.elements:
        for key in ("src", "href", "xlink:href"):
            assert attrs.get(key, "#").startswith(("#", "data:image/png;base64,"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    assert references <= set(ids)


def test_the_page_is_accessible(report):
    page = Page(report["report.html"].read_text())
    assert page.of("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.of("meta")
    pictures = [attrs for _, attrs in page.elements if attrs.get("role") == "img"]
    assert (
        len(pictures) == len(page.of("svg")) == 7
    )  # two curves, depth, two heat maps, tensors, Jacobian
    assert all(len(attrs["aria-label"]) > 40 for attrs in pictures)
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.of("th"))


def test_the_page_tells_the_numbers(report):
    results = make_results()
    text = " ".join(Page(report["report.html"].read_text()).text)
    for cells in table(results).values():
        assert all(cell in text for cell in cells)
    assert conclusion(results) in text
    assert results["command"] in text
    for site in SITES:
        assert site in text


def test_special_characters_are_text(tmp_path):
    results = make_results(seeds=1, epochs=1)
    evil = "<script>alert('&')</script> | $x_1$ \\"
    results.update(title=evil, command=evil, sites=[evil, *SITES[1:]], config={evil: evil})
    results["environment"][evil] = evil
    results["data"]["note"] = evil
    rule = results["rules"][1]
    rule.update(label=evil, options={evil: evil})
    rule["runs"][0]["alignment"][-1]["sites"][evil] = {
        "angle": 45.0,
        "bp_norm": 1.0,
        "jacobian_cosine": 0.1,
    }
    rule["runs"][0]["alignment"][-1]["parameters"][evil] = {"angle": 45.0}
    rule["runs"].append({"seed": 1, "status": "diverged", "message": evil})
    paths = write_report(results, tmp_path)
    assert not Page(paths["report.html"].read_text()).of("script")
    outside_code = re.sub(r"```.*?```", "", paths["report.md"].read_text(), flags=re.DOTALL)
    assert "<script" not in outside_code
    assert "\\|" in outside_code


def test_nan_becomes_null(tmp_path):
    results = make_results(seeds=2, epochs=2)
    run = results["rules"][1]["runs"][1]
    run.update(status="diverged", test_accuracy=float("nan"), message="loss became NaN")
    run["epochs"][-1].update(train_loss=float("inf"), validation_accuracy=float("nan"))
    run["alignment"][-1]["sites"][SITES[0]]["angle"] = float("nan")
    results["rules"][2]["step_ratio"] = float("nan")
    paths = write_report(results, tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    saved = json.loads(paths["results.json"].read_text(), parse_constant=refuse)
    assert saved["rules"][1]["runs"][1]["test_accuracy"] is None
    assert not re.search(r"\bnan\b", paths["report.html"].read_text())


def test_little_data_still_makes_a_report(tmp_path):
    bare = write_report(small(dkp=[80.0], dfa=[None]), tmp_path / "bare")
    assert not Page(bare["report.html"].read_text()).of("svg")
    nothing = write_report({"version": 1}, tmp_path / "nothing")
    assert "No run has finished" in nothing["report.md"].read_text()
    unprobed = make_results(seeds=1, epochs=1)
    for rule in unprobed["rules"]:
        rule["runs"][0]["alignment"] = []
    page = Page(write_report(unprobed, tmp_path / "unprobed")["report.html"].read_text())
    assert len(page.of("svg")) == 2


def test_another_schema_version_is_refused():
    with pytest.raises(FeedbackError, match=r"schema version 2.*reads version 1"):
        summarise({"version": 2, "rules": []})


def test_an_unwritable_folder_is_one_clear_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FeedbackError, match=r"cannot be written to .*file.*Name a folder"):
        write_report(small(dkp=[80.0]), tmp_path / "file")


@pytest.mark.nightly
def test_a_rule_with_sites_of_its_own_is_shown_at_them(tmp_path):
    """A chain's or a relay's sites have other names than the nodes that the first rule has: its angles must not be left out."""
    names = [f"{site}.input" for site in SITES]
    results = with_other_sites(make_results(("bp", "dkp", "dfa")), "dkp", names)
    text = write_report(results, tmp_path)["report.md"].read_text()
    before = write_report(make_results(("bp", "dkp", "dfa")), tmp_path / "before")[
        "report.md"
    ].read_text()
    for site, name in zip(SITES, names, strict=True):
        (line,) = (line for line in before.splitlines() if line.startswith(f"| {site} |"))
        dkp, dfa = (cell.strip() for cell in line.strip("|").split("|")[1:])
        assert f"| {name} | {dkp} | – |" in text
        assert f"| {site} | – | {dfa} |" in text
    page = (tmp_path / "report.html").read_text()
    assert all(f"{name} " in page for name in names)  # in the text of the heat map
