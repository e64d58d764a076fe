"""Results as rows and words: one comparison in detail, a grid of them, what was run and what was not."""

from __future__ import annotations

from collections import Counter
from typing import Any

from feedbackward.experiment.config.tasks import measure_of, value_of
from feedbackward.experiment.report import summary as statistics
from feedbackward.experiment.report.numbers import NONE, fixed, plus_minus, size
from feedbackward.experiment.report.summary import Results, done_runs, summarise

# what is shown of a cell without an accuracy: the first of these that a run has
ORDER = ("unfinished", "diverged", "refused", "failed", "not run")
COUNTED = ("done", "diverged", "refused", "failed", "unfinished", "not run", "no data")


def as_grid(results: Results) -> Results:
    """The document of a grid; a single comparison, also one of 0.1.0, as a grid of one cell."""
    if "sections" in results:
        return results
    rules = [
        {**rule, "label": statistics.label_of(rule), "runs": rule.get("runs") or []}
        for rule in results.get("rules") or []
    ]
    labels = [rule["label"] for rule in rules]
    seeds = list(dict.fromkeys(run.get("seed") for rule in rules for run in rule["runs"]))
    block: Results = {
        "column": "",
        "folder": "",
        "title": "",
        "point": {},
        "missing": None,
        "seeds": seeds,
    }
    block |= {**results, "title": "", "rules": rules}
    table = {"title": "", "labels": labels, "blocks": [block]}
    facts = {"about": "", "sets": {}, "scale": 1, "environment": {}, "created": ""} | results
    section = {"name": "", "title": "", "about": "", "tables": [table]}
    return facts | {"sections": [section]}


def is_single(results: Results) -> bool:
    """Whether the document has one comparison, which is then shown in detail."""
    return [section["name"] for section in results["sections"]] == [""]


def detailed(results: Results) -> dict[str, list[str]]:
    """Heading of each column and its cells, one per rule; a column without any value is left out."""
    columns: dict[str, list[str]] = {}
    rows = summarise(results)
    headings = [measure_of(row).heading for row in rows]
    for row in rows:
        cost, digits = row["cost"] or {}, measure_of(row).digits
        score = plus_minus(row["mean"], row["std"], digits)
        cells = {
            "Rule": str(row["label"]),
            headings[0]: "refused" if row["refused"] else score,
            "n": _n(row),
            "Diverged": str(row["diverged"]) if row["diverged"] else NONE,
            "Gap to BP": _difference(row["gap"], digits),
            "vs Frozen": _difference(row["frozen"], digits, sign=True),
            "Mean angle": NONE if row["angle"] is None else f"{fixed(row['angle'])}°",
            "Time per step": _ratio(row["step_ratio"]),
            "Peak memory": _ratio(row["peak_ratio"]),
            "Multiply-adds": _ratio(cost.get("macs")),
            "Feedback": size(row["feedback_bytes"]),
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    return {name: cells for name, cells in columns.items() if set(cells) != {NONE}}


def _difference(value: dict[str, Any] | None, digits: int, sign: bool = False) -> str:
    return NONE if value is None else plus_minus(value["mean"], value["se"], digits, sign)


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"


def _n(row: dict[str, Any]) -> str:
    if row["refused"]:
        return NONE
    return str(row["n"]) if row["n"] == row["planned"] else f"{row['n']}/{row['planned']}"


def columns_of(table: Results) -> tuple[list[str], list[list[dict[str, str]]]]:
    """Headings and rows of a table: one comparison in detail if there is a single one, else a column each."""
    (block, *others) = table["blocks"]
    if block["folder"] == "" and not others:
        columns = detailed(block)
        columns.pop("Rule", None)
        rows = [
            [empty() | {"text": text} for text in row]
            for row in zip(*columns.values(), strict=True)
        ]
        return [*columns], rows
    heads = [head(block) for block in table["blocks"]]
    return heads, [[cell(block, label) for block in table["blocks"]] for label in table["labels"]]


def head(block: Results) -> str:
    """`CIFAR-10 (2,250 images, 3 epochs, 1 seed)`: what the cells of a column were run on."""
    if block.get("missing"):
        return f"{block['column']} (no data)"
    data, size = block["data"], (block.get("config") or {}).get("data", {}).get("size")
    seeds = len(block["seeds"])
    images = (block.get("config") or {}).get("task", "classification") == "classification"
    parts = [
        f"{data['train']:,} {'images' if images else 'to train on'}",
        f"at {size} px" if size else "",
        _count(block["epochs"], "epoch"),
        _count(seeds, "seed"),
    ]
    return f"{block['column']} ({', '.join(filter(None, parts))})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def empty() -> dict[str, str]:
    """A cell of a table without anything in it."""
    return {"text": NONE, "gap": "", "steps": "", "state": "none"}


def cell(block: Results, label: str) -> dict[str, str]:
    """What a table says of a rule in a comparison: `text`, `gap` (to backprop, paired), `steps`, `state`."""
    rule = next((r for r in block["rules"] if r["label"] == label), None)
    if rule is None:
        return empty()
    if block.get("missing"):
        return empty() | {"text": "no data", "state": "missing"}
    row = next(row for row in summarise(block) if row["label"] == label)
    steps = (rule.get("cost") or {}).get("steps")
    shown = "" if steps is None or rule["rule"] == "frozen" else _count(steps, "step")
    if row["n"]:
        gap, digits = row["gap"], measure_of(row).digits
        text = plus_minus(row["mean"], row["std"], digits)
        if row["n"] < row["planned"]:
            text += f" ({row['n']} of {row['planned']})"
        to_bp = "" if gap is None else plus_minus(-gap["mean"], gap["se"], digits, sign=True)
        return {"text": text, "gap": to_bp, "steps": shown, "state": "done"}
    if row["refused"]:
        return empty() | {"text": "refused", "state": "refused"}
    states = {run["status"] for run in rule["runs"]}
    state = next((state for state in ORDER if state in states), "not run")
    return empty() | {"text": state, "state": state.replace(" ", "-")}


def blocks(results: Results) -> list[Results]:
    """Every comparison of a grid, each once."""
    found = {b["folder"]: b for s in results["sections"] for t in s["tables"] for b in t["blocks"]}
    return list(found.values())


def counts(results: Results) -> Counter[str]:
    """How many cells are done, diverged, refused, without data, ..."""
    found: Counter[str] = Counter()
    for block in blocks(results):
        for rule in block["rules"]:
            planned = len(block["seeds"])
            if block.get("missing"):
                found["no data"] += planned
            elif rule.get("refused"):
                found["refused"] += planned
            else:
                found.update(run["status"] for run in rule["runs"])
    return found


def summary(results: Results) -> str:
    """One sentence: of a single comparison what it shows; of a grid its scale and what was run."""
    if is_single(results):
        return statistics.conclusion(blocks(results)[0])
    found, scale = counts(results), results["scale"]
    shown = ", ".join(f"{found[state]} {state}" for state in COUNTED if found[state])
    how = (
        f"At scale {scale:g}: {100 * scale:g} % of the training images" if scale < 1 else "In full"
    )
    return f"{how}. Of {sum(found.values())} cells: {shown}."


def notes(results: Results) -> list[str]:
    """What to know before trusting the table: scale, missing data, lost cells, where rates come from."""
    found: dict[str, None] = {}
    if results["scale"] < 1:
        found[
            "The training images are the first of a fixed random order, the same for every rule and seed, "
            "not drawn class by class; epochs are fixed per net. At this size the table shows that the "
            "comparison works, not what the rules reach."
        ] = None
    if results["sets"]:
        changes = ", ".join(f"{key} = {value}" for key, value in results["sets"].items())
        found[f"Changed on the command line: {changes}."] = None
    if is_single(results):
        found |= dict.fromkeys(statistics.notes(blocks(results)[0]))
    else:
        for block in blocks(results):
            found |= dict.fromkeys(_block_notes(block))
        found[_rates(results)] = None
    return list(found)


def _block_notes(block: Results) -> list[str]:
    name, data, found = block["config"]["data"]["name"], block["data"], []
    if block.get("missing"):
        found.append(f"No data for {name}: {block['missing']}")
    else:
        share = f"{name}: at most {data['whole']:,} training images here" if data["whole"] else name
        official = data.get("official")
        share += f" (the official set has {official:,})" if official else ""
        note = f"; {data['note']}" if data.get("note") else ""
        share += f", {data['validation']:,} held out, {data['test']:,} test images{note}."
        found.append(share)
    return found + statistics.rule_notes(block["rules"], ("diverged", "failed"), block["title"])


def _rates(results: Results) -> str:
    ways = {_way(rule) for b in blocks(results) for rule in b["rules"] if done_runs(rule)}
    sentences = {
        "config": "Rates are those of the recipe or of the config: no search was made here.",
        "each": "All rates were picked on held-out images by equal trials for every rule.",
        "first": "W's rate was picked for the first rule, on held-out images; all others have the same one.",
    }
    mixed = "Rates says, for each rule, whether its rate was picked on held-out images, is that of another rule, or is the config's."
    if not ways:
        return "No cell has finished yet."
    return sentences[ways.pop()] if len(ways) == 1 else mixed


def _way(rule: Results) -> str:
    """How a rule came to its rates: by its own search as each, by the first one's, or by the config."""
    if rule.get("baseline_only"):
        return "first"
    return "each" if rule.get("searched") else "config"


def rates(results: Results) -> list[list[str]]:
    """Rows of comparison, rule, rate of W, rate of B, and how they were found."""
    rows = []
    for block in blocks(results):
        for rule in block["rules"]:
            found = rule.get("rates") or {}
            lr, feedback = (
                f"{v:.3g}" if (v := found.get(key)) is not None else "–"
                for key in ("lr", "feedback_lr")
            )
            if rule.get("searched"):
                pruned = sum(trial.get("status") == "pruned" for trial in rule["search"])
                of = f"{len(rule['search'])}" + (f" ({pruned} pruned)" if pruned else "")
                way = f"picked of {of} in {rule['searched']}"
            else:
                way = f"that of {rule['follows']}" if rule.get("follows") else "config"
            rows.append([block["title"], rule["label"], lr, feedback, way])
    return rows


def runs(results: Results) -> list[list[str]]:
    """Rows of every cell: comparison, rule, seed, status, accuracies and seconds."""
    rows: list[list[Any]] = []
    for block in blocks(results):
        for rule in block["rules"]:
            for run in rule["runs"] if not block.get("missing") else []:
                digits = measure_of(run).digits
                numbers = [
                    fixed(value_of(run), digits),
                    fixed(value_of(run, "validation"), digits),
                    fixed(run.get("seconds")),
                ]
                rows.append(
                    [
                        block["title"],
                        rule["label"],
                        str(run.get("seed")),
                        str(run.get("status")),
                        *numbers,
                    ]
                )
    return rows
