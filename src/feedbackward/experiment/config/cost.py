"""What `feedbackward cost` is asked to count or measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from feedbackward.experiment.config.schema import RuleEntry


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """What a training step costs, by rule, operator and schedule, beside backprop.

    Attributes:
        models: nets, package.module:callable, path/to/file.py:callable, timm:name or hf:type; also as arguments without a
            flag.
        model_options: options of a net of your own, of timm or of transformers.
        rules: names, entries with rule, label and options, or `all`; by default all, and with --measure
            dfa and dkp.
        operators: forms of the feedback, for the rules that have a choice; by default each rule's own.
        sites: layers, blocks, published, or a list of module names; by default the net's own choice.
        error_at: the module whose output's error is sent; by default the net's output.
        norm: use batch norm in the named nets.
        classes: outputs of the net.
        channels: channels of an image.
        size: height and width of an image.
        batch: images per step.
        measure: run training steps and measure their time and memory, beside the counted multiply-adds.
        schedules: joint, replay, replay-keep (with keep_inputs=True) or eager; needs --measure.
        rounds: how often to measure; in each round every configuration takes one step.
        threads: CPU threads; by default PyTorch's choice.
        precision: bf16 uses autocast.
        channels_last: use the channels-last memory format for images and convolutions.
        compile: compile with torch.compile; joint schedules only.
        device: auto takes a CUDA device if there is one.
        stages: simulate the net divided over so many processes, from times that are measured here.
        micro_batches: parts of a batch, which follow each other through the stages.
        link: speed of the network between two processes, in Mbit/s; by default without bounds.
        latency: milliseconds that a message is under way, besides.
        json: write all numbers to this file.
        plot: write a figure to this file: .png, .svg or .pdf.
    """

    models: list[str] = field(default_factory=list)
    model_options: dict[str, Any] = field(default_factory=dict)
    rules: list[str | RuleEntry] | None = None
    operators: list[str | dict[str, Any]] = field(default_factory=list)
    sites: str | list[str] | None = None
    error_at: str | None = None
    norm: bool = True
    classes: int = 10
    channels: int = 3
    size: int = 32
    batch: int = 64
    measure: bool = False
    schedules: list[Literal["joint", "replay", "replay-keep", "eager"]] = field(
        default_factory=lambda: ["joint"]
    )
    rounds: int = 11
    threads: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    stages: list[int] = field(default_factory=list)
    micro_batches: int = 4
    link: float | None = None
    latency: float = 0.0
    json: str | None = None
    plot: str | None = None
