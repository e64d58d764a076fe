"""Nets of other libraries by name: `timm:resnet18`, and `hf:vit` for a model type of transformers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from feedbackward.errors import ConfigError
from feedbackward.experiment.config.suggest import hint


def timm_net(
    name: str, in_shape: tuple[int, ...], classes: int, task: str, **options: Any
) -> nn.Module:
    """timm's net of this name, with random weights unless `pretrained=True` is among the options.

    A net that is made for one size of images, such as a vision transformer, is made for those of the data.
    """
    timm = _library("timm", f"timm:{name}", task, ("classification",))
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}: {hint(name, timm.list_models())}")
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        options = {"img_size": in_shape[1:], **options}
    return _made(
        f"timm:{name}",
        lambda: timm.create_model(name, in_chans=in_shape[0], num_classes=classes, **options),
    )


class Logits(nn.Module):
    """A model of transformers that takes its main input alone and returns its logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The logits for images, or for the characters of sequences."""
        logits: Tensor = self.model(**{self.model.main_input_name: x}).logits
        return logits


# what a model of transformers is for: its class, and how its configuration calls the number of outputs
_CLASSES = {
    "classification": ("AutoModelForImageClassification", "num_labels"),
    "language_model": ("AutoModelForCausalLM", "vocab_size"),
}


def transformers_net(
    name: str, in_shape: tuple[int, ...], classes: int, task: str, **options: Any
) -> nn.Module:
    """A model of transformers: a type (`vit`, `gpt2`), or a folder or a hub's repository that holds a configuration.

    Its weights are random unless `pretrained=True` is among the options; all others are its configuration's.
    """
    transformers = _library("transformers", f"hf:{name}", task, tuple(_CLASSES))
    kind, outputs = _CLASSES[task]
    pretrained = options.pop("pretrained", False)
    own = {outputs: classes}
    if task == "classification":
        own |= {"num_channels": in_shape[0], "image_size": in_shape[1]}

    def make() -> nn.Module:
        config = _config(transformers, name)
        for key in options:
            if not hasattr(config, key):
                raise ConfigError(f"{type(config).__name__} has no option {key!r}")
        for key, value in {**own, **options}.items():
            if hasattr(config, key):
                setattr(config, key, value)
        auto = getattr(transformers, kind)
        if not pretrained:
            return Logits(auto.from_config(config))
        return Logits(auto.from_pretrained(name, config=config, ignore_mismatched_sizes=True))

    return _made(f"hf:{name}", make)


def _config(transformers: Any, name: str) -> Any:
    """The configuration of a model type, a folder or a repository."""
    if name in transformers.CONFIG_MAPPING:
        return transformers.AutoConfig.for_model(name)
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        first = str(error).strip().split("\n")[0]
        types = (
            hint(name, transformers.CONFIG_MAPPING)
            if Path(name).name == name
            else "as a folder or a repository"
        )
        raise ConfigError(f"the net 'hf:{name}' has no configuration ({first}): {types}") from error


LIBRARIES = {"timm": timm_net, "hf": transformers_net}


def _library(package: str, net: str, task: str, tasks: tuple[str, ...]) -> Any:
    if task not in tasks:
        raise ConfigError(
            f"the net {net!r} is for {' or '.join(tasks)}, not for task {task}: name another net"
        )
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = error.name or package
        raise ConfigError(
            f"the net {net!r} needs {package} ({error}): pip install {missing}"
        ) from error


def _made(net: str, make: Any) -> nn.Module:
    """The net; what its library says of a name, an option or a size, in one line."""
    try:
        model: nn.Module = make()
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        text = str(error).strip().split("\n")[0]
        raise ConfigError(f"the net {net!r} cannot be made: {text}") from error
    return model
