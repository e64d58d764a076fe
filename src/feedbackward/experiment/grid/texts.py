"""A study's results in words: heads, cells, what was run and what was not."""

from __future__ import annotations

from collections import Counter
from typing import Any

from feedbackward.experiment.report.report import fixed, plus_minus
from feedbackward.experiment.report.summary import Results, conditions, done_runs, summarise

ORDER = (
    "unfinished",
    "diverged",
    "refused",
    "failed",
    "not run",
)  # what is told of a cell without an accuracy


def head(block: Results) -> str:
    """`CIFAR-10 (2,250 images, 3 epochs, 1 seed)`: what the cells of a column were run on."""
    if block.get("missing"):
        return f"{block['column']} (no data)"
    data, size = block["data"], (block.get("config") or {}).get("data", {}).get("size")
    seeds = len(block["seeds"])
    parts = [
        f"{data['train']:,} images",
        f"at {size} px" if size else "",
        _count(block["epochs"], "epoch"),
        _count(seeds, "seed"),
    ]
    return f"{block['column']} ({', '.join(filter(None, parts))})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def cell(block: Results, label: str) -> dict[str, str]:
    """What a table says of a rule in a comparison: `text`, `gap` (to backprop, paired), `steps`, and its `state`."""
    empty = {"text": "–", "gap": "", "steps": "", "state": "none"}
    rule = next((r for r in block["rules"] if r["label"] == label), None)
    if rule is None:
        return empty
    if block.get("missing"):
        return empty | {"text": "no data", "state": "missing"}
    row = next(row for row in summarise(block) if row["label"] == label)
    steps = (rule.get("cost") or {}).get("steps")
    told = {"steps": "" if steps is None or rule["rule"] == "frozen" else _count(steps, "step")}
    if row["n"]:
        gap = row["gap"]
        minus = None if gap is None else -gap["mean"]
        text = plus_minus(row["mean"], row["std"]) + (
            "" if row["n"] == row["planned"] else f" ({row['n']} of {row['planned']})"
        )
        return (
            empty
            | told
            | {
                "text": text,
                "gap": "" if gap is None else plus_minus(minus, gap["se"], sign=True),
                "state": "done",
            }
        )
    if row["refused"]:
        return empty | {"text": "refused", "state": "refused"}
    states = {run["status"] for run in rule["runs"]}
    state = next((state for state in ORDER if state in states), "not run")
    return empty | {"text": state, "state": state.replace(" ", "-")}


def blocks(results: Results) -> list[Results]:
    """Every comparison of a study, each once."""
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
    """One sentence: at what scale, and what of it was run."""
    found = counts(results)
    order = ("done", "diverged", "refused", "failed", "unfinished", "not run", "no data")
    told = ", ".join(f"{found[state]} {state}" for state in order if found[state])
    scale = results["scale"]
    how = (
        "In full" if scale == 1 else f"At scale {scale:g}: {100 * scale:g} % of the training images"
    )
    return f"{how}. Of {sum(found.values())} cells: {told}."


def notes(results: Results) -> list[str]:
    """What to know before trusting the table: small scale, missing data, lost cells, where rates come from."""
    said: dict[str, None] = {}
    if results["scale"] < 1:
        said[
            "The training images are the first of a fixed random order, the same for every rule and seed, not drawn class by class; "
            "epochs are fixed per net. At this size the table shows that the study works, not what the rules reach."
        ] = None
    if results["sets"]:
        said[
            "Changed on the command line: "
            + ", ".join(f"{k} = {v}" for k, v in results["sets"].items())
            + "."
        ] = None
    for block in blocks(results):
        name = block["config"]["data"]["name"]
        if block.get("missing"):
            said[f"No data for {name}: {block['missing']}"] = None
        else:
            data = block["data"]
            share = (
                f"{name}: at most {data['whole']:,} training images here" if data["whole"] else name
            )
            official = (
                f" (the official set has {data['official']:,})" if data.get("official") else ""
            )
            note = f"; {data['note']}" if data.get("note") else ""
            said[
                f"{share}{official}, {data['validation']:,} held out, {data['test']:,} test images{note}."
            ] = None
        said.update(dict.fromkeys(conditions(block["rules"])))
        for rule in block["rules"]:
            if rule.get("refused"):
                said[f"{rule['label']} was refused: {rule['refused']}"] = None
            for run in rule["runs"]:
                if run["status"] in ("diverged", "failed"):
                    said[
                        f"{block['title']}, {rule['label']}, seed {run['seed']}: {run['status']} ({run['message']})"
                    ] = None
    said[_rates(results)] = None
    return list(said)


def _rates(results: Results) -> str:
    ways = {_way(rule) for b in blocks(results) for rule in b["rules"] if done_runs(rule)}
    told = {
        "config": "Rates are those of the recipe or of the study's config: no search was made here.",
        "each": "All rates were picked on held-out images by equal trials for every rule.",
        "first": "W's rate was picked for the first rule, on held-out images; all others have the same one.",
    }
    mixed = "Rates says, for each rule, whether its rate was picked on held-out images, is that of another rule, or is the config's."
    return (
        "No cell has finished yet." if not ways else told[ways.pop()] if len(ways) == 1 else mixed
    )


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
                way = f"picked of {len(rule['search'])} in {rule['searched']}"
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
                numbers = [
                    fixed(run[key]) for key in ("test_accuracy", "validation_accuracy", "seconds")
                ]
                rows.append(
                    [block["title"], rule["label"], str(run["seed"]), run["status"], *numbers]
                )
    return rows
