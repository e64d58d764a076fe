"""The flags of each command: their headings in `--help`, their short names, and examples."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docstring_parser

SHIPPED = Path(__file__).parent / "shipped"

# flags that are short for another
SHORT = {
    "data.name": "data",
    "data.root": "data-root",
    "forward.name": "optimizer",
    "forward.lr": "lr",
    "feedback.lr": "feedback-lr",
    "search.run": "search",
}

# heading in --help: fields of a config, or "part." for all of a part; all others are advanced
HEADINGS = {
    "Model and rule": "task model models model_options rule rule_options rules operators sites norm dropout",
    "Data": "data.",
    "Training": "recipe epochs batch_size forward.name forward.lr feedback.lr seed seeds",
    "Search of rates": "search.",
    "Part of a grid": "only. scale",
    "Results": "out overwrite resume report_only dry_run title probe_every tensorboard logger json plot",
    "Images": "classes channels size batch",
    "Measurement": "measure schedules rounds",
    "Pipeline of processes": "stages micro_batches link latency",
    "Machine": "device precision threads workers executor compile channels_last",
    "Several processes": "parallel.",
    "Advanced: schedules and feedback": "",
    "Advanced: optimizer of the network's weights": "forward.",
    "Advanced: optimizer of learned feedback": "feedback.",
}
OTHERS = "Advanced: schedules and feedback"

ABOUT = {
    "train": "Train one network by one rule.",
    "compare": "Train by several rules and seeds under one recipe, and write a report. A config file with "
    "`sections` describes a grid of comparisons. A finished run is skipped and a stopped one is "
    "continued, so the same command goes on after Ctrl-C or a crash.",
    "cost": "Count the multiply-adds, bytes and steps in sequence of a training step, by rule and operator, "
    "beside backprop. With --measure, also measure its time and memory. With --stages, simulate the net divided over processes.",
}
EXAMPLES = {
    "train": """\
  feedbackward train --rule dkp --model vgg6 --epochs 5
  feedbackward train --rule dfa --data cifar10 --data-root data --lr 0.01
  feedbackward train --rule dkp --model my_package.nets:make_net --data path/to/images
  feedbackward train --config runs/vgg6-fashion-mini-dkp-s0/config.yaml --resume""",
    "compare": """\
  feedbackward compare --config demo
  feedbackward compare --rules bp,dfa,dkp,frozen --model vgg6 --seeds 0,1,2 --search
  feedbackward compare --config paper --dry-run
  feedbackward compare --config paper --scale 0.05 --data-root data --only.rules bp,dkp""",
    "cost": """\
  feedbackward cost vgg16 --batch 100
  feedbackward cost vgg16 --rules dfa,dkp --operators dense,sparse
  feedbackward cost vgg16 --stages 2,4,8 --micro-batches 8 --link 1000
  feedbackward cost vgg16 resnet20 --measure --rules dkp --schedules joint,replay""",
}
# what stands for a value in --help
METAVARS = {int: "N", float: "X", str: "NAME"}


@dataclass(frozen=True)
class Option:
    """One flag: the field that it sets, and what `--help` says of it."""

    field: str
    hint: Any
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.field.replace("_", "-")

    @property
    def flags(self) -> list[str]:
        """The flag, and the one that is short for it."""
        return [self.flag, *(f"--{SHORT[self.field]}" for _ in (1,) if self.field in SHORT)]

    @property
    def heading(self) -> str:
        part = self.field.partition(".")[0] + "."
        for name in (self.field, part if "." in self.field else ""):
            for heading, fields in HEADINGS.items():
                if name and name in fields.split():
                    return heading
        return OTHERS

    @property
    def is_switch(self) -> bool:
        return self.hint is bool or bool in typing.get_args(self.hint)

    @property
    def is_list(self) -> bool:
        return any(typing.get_origin(h) is list for h in (self.hint, *typing.get_args(self.hint)))

    @property
    def is_mapping(self) -> bool:
        return typing.get_origin(self.hint) is dict

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.metavar and self.metavar.startswith("{"):
            return "one of " + self.metavar.strip("{}").replace(",", ", ")
        if self.is_switch:
            return "yes or no"
        words = {"N": "a whole number", "X": "a number", "A,B,...": "a list of such values"}
        words["OPTIONS"] = "names and values, as in {center: true}"
        text = "a text, in quotes where it looks like something else"
        return words.get(self.metavar or "", text)

    @property
    def metavar(self) -> str | None:
        """What stands for the value in `--help`; None for choices, which are listed."""
        kinds = [*typing.get_args(self.hint), self.hint]
        literal = next((k for k in kinds if typing.get_origin(k) is typing.Literal), None)
        if literal is not None:
            return "{" + ",".join(map(str, typing.get_args(literal))) + "}"
        if self.field in ("out", "data.root"):
            return "FOLDER"
        if self.field in ("json", "plot", "parallel.trace"):
            return "FILE"
        if self.is_mapping:
            return "OPTIONS"
        return "A,B,..." if self.is_list else METAVARS.get(kinds[0], "VALUE")


def options(kind: type, prefix: str = "") -> Iterator[Option]:
    """Every flag of a config, the nested ones by their dotted names."""
    hints, texts = typing.get_type_hints(kind), _texts(kind)
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from options(typing.cast(type, hint), f"{name}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Option(name, hint, default, texts.get(field.name, ""))


def _texts(kind: type) -> dict[str, str]:
    """What the docstrings of a config and of its bases say of its fields."""
    texts = {}
    for base in reversed(kind.__mro__[:-1]):
        for found in docstring_parser.parse(base.__doc__ or "").params:
            for name in found.arg_name.split(", "):
                texts[name] = " ".join((found.description or "").split())
    return texts


def shipped() -> str:
    """The names of the configs that come with the package."""
    return ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
