"""The model card of a finished run: its README.md, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import json

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from feedbackward.experiment.config.schema import TrainConfig
from feedbackward.experiment.config.tasks import KINDS
from feedbackward.experiment.data.sources import DATASETS
from feedbackward.experiment.training.building import make_rule, shared_data
from feedbackward.experiment.training.identity import tied_settings
from feedbackward.experiment.training.runfolder import RunFolder
from feedbackward.rules import TIERS, Rule

# what the hub calls a task
_HUB_TASKS = {"classification": "image-classification", "language_model": "text-generation"}
# what the text of the card says already
_TOLD = ("rule", "rule_options", "task", "model", "model_options", "norm", "seed")
_UNLOCKED = {
    "": "A layer's signal waits for those of the layers above.",
    "backward": "No layer's signal waits for that of another layer.",
    "update": "No layer's signal waits for that of another layer, nor for the error of the output.",
    "forward": "No layer waits for the layers above, in the forward pass either.",
}
_TIERS = {
    "control": "It is a control, which others are compared with.",
    "baseline": "It is a published baseline, and not among the recommended rules.",
    "contrib": "It is a method that is not among the recommended rules.",
}


def write_card(folder: RunFolder) -> None:
    """Write the card of a finished run, unless it has one, to which the user may have added."""
    if not folder.card.exists():
        folder.write(folder.card, make_card(folder))


def make_card(folder: RunFolder) -> str:
    """The card of a finished run. A folder of images is called by its last name alone."""
    config = folder.config().resolved()
    data, identity = shared_data(config.data, config.task), folder.data() or {}
    kind, known = KINDS[config.task], DATASETS.get(config.data.name)
    result = folder.result() or {}
    tested = result[f"test_{kind.measure.key}"]
    epochs = [row for row in folder.rows() if row["kind"] == "epoch"]
    held_out = epochs[-1][f"validation_{kind.measure.key}"] if epochs else None
    dataset, hub_id = data.name, known.hub_id if known else None
    task, name = _HUB_TASKS.get(config.task, config.task), folder.path.resolve().name
    head = ModelCardData(
        library_name="feedbackward",
        tags=["pytorch", "feedbackward", "direct-feedback", config.rule],
        datasets=[hub_id] if hub_id else None,
        metrics=[kind.measure.key],
        pipeline_tag=_HUB_TASKS.get(config.task),
        model_name=name,
        eval_results=[EvalResult(task, hub_id or dataset, dataset, kind.measure.key, tested)],
    )
    rule = make_rule(config.rule, config.rule_options)
    view = {
        "card_data": head.to_yaml(),
        "name": name,
        "config": config,
        "rule": rule,
        "options": json.dumps(config.rule_options) if config.rule_options else "",
        "about": _about(rule, config.rule, result["feedback_bytes"]),
        "dataset": dataset,
        "unit": "images" if config.task == "classification" else "items",
        "data": identity,
        "shape": tuple(data.shape),
        "classes": json.dumps(identity["classes"], ensure_ascii=False),
        "held_out": None if held_out is None else kind.measure.in_words(held_out, 2, named=True),
        "tested": kind.measure.in_words(tested, 2, named=True),
        "settings": _settings(config),
        "versions": json.loads(folder.environment_file.read_text(encoding="utf-8"))[-1],
    }
    loader = jinja2.PackageLoader("feedbackward.experiment.training", "templates")
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("card.md").render(view) + "\n"


def _about(rule: Rule, name: str, size: int) -> list[str]:
    """What a reader should know of a rule whose feedback has so many bytes."""
    tier = next((tier for tier, rules in TIERS.items() if name in rules), "")
    uses = {"False": "no", "True": "the"}.get(str(rule.transport), f"the {rule.transport} of the")
    lines = [
        f"Its backward pass uses {uses} forward weights.",
        f"Its feedback weights ({size:,} bytes) are {'learned' if rule.learned else 'fixed'}."
        if size
        else "It has no feedback weights.",
        _UNLOCKED[rule.unlocked],
        _TIERS.get(tier, ""),
    ]
    return [line for line in lines if line]


def _settings(config: TrainConfig) -> dict[str, str]:
    """The settings that decide what a run computes, a group of them in one row."""
    return {
        key: ", ".join(f"{name} {v}" for name, v in value.items())
        if isinstance(value, dict)
        else str(value)
        for key, value in tied_settings(config).items()
        if key not in _TOLD
    }
