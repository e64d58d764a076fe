"""The networks of the experiments: `NETS`, and `build` by name.

Every activation, pool and norm is a module of its own, used once and not in place, so that each name is a
possible site (a name means that module's output). Weights are drawn from PyTorch's global generator.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from feedbackward.errors import ConfigError
from feedbackward.experiment.nets import alexnet, graph, small_cnn, transformer, vgg
from feedbackward.experiment.nets.blocks import set_dropout
from feedbackward.experiment.nets.custom import build_custom
from feedbackward.experiment.nets.deepfm import DeepFM
from feedbackward.experiment.nets.field import Field
from feedbackward.experiment.nets.mlp import MLP
from feedbackward.experiment.nets.recurrent import Recurrent, Rows
from feedbackward.experiment.nets.resnet import ResNet
from feedbackward.experiment.nets.sentences import Sentences

__all__ = [
    "NETS",
    "Net",
    "build",
    "default_error_at",
    "default_sites",
    "published_sites",
    "set_dropout",
]


@dataclass(frozen=True)
class Net:
    """One row of `NETS`."""

    build: Callable[..., nn.Module]
    """`build(in_shape, classes, norm)` -> a module [N, *in_shape] -> [N, classes]."""
    about: str
    """One line: what it is and where it comes from."""
    sites: tuple[str, ...] | str = "layers"
    """Sites used unless the user names others."""
    published_sites: tuple[str, ...] | None = None
    """The module names at which the net's authors injected feedback, if they published any."""
    min_side: int = 1
    """Smallest height and width in pixels that its unpadded layers leave something of."""
    task: str = "classification"
    """The task that it is made for."""
    error_at: str | None = None
    """The module whose output's error is sent unless the user names another."""


def _transformer(depth: int, width: int = 128, stages: int | None = None) -> Net:
    about = f"{depth} pre-norm blocks of width {width} (after GPT-2, Radford et al. 2019), for characters"
    if stages is not None:
        about += f"; their branches beside each other, in {stages} stages"
    return Net(
        partial(transformer.Transformer, depth=depth, width=width, stages=stages),
        about,
        sites="blocks",
        # a stage has no place between its attention and its feed-forward part
        published_sites=transformer.micro_sites(depth) if stages is None else None,
        task="language_model",
    )


def _in_layers(build: partial[Any], about: str, depth: int, task: str) -> Net:
    """A net of recurrent layers, which are its sites, or every step of them."""
    steps = build.keywords["steps"]
    inside = ".steps.0" if steps else ""
    return Net(
        build,
        about + (", a site of every step" if steps else ""),
        sites=tuple(f"layers.{i}{inside}" for i in range(depth)),
        task=task,
    )


def _recurrent(kind: type[nn.RNNBase], steps: bool = False) -> Net:
    about = f"2 {kind.__name__} layers of width 128, for characters"
    return _in_layers(partial(Recurrent, kind=kind, steps=steps), about, 2, "language_model")


def _rows(kind: type[nn.RNNBase], steps: bool) -> Net:
    about = f"2 {kind.__name__} layers of width 128 over the rows of an image"
    return _in_layers(partial(Rows, kind=kind, steps=steps), about, 2, "classification")


def _music(kind: type[nn.RNNBase], steps: bool = False) -> Net:
    build = partial(Recurrent, kind=kind, width=64, depth=1, frames=True, steps=steps)
    return _in_layers(
        build, f"one {kind.__name__} layer of width 64, for frames of keys", 1, "music"
    )


def _graph(about: str, depth: int = 2, error_at: str | None = None, **options: Any) -> Net:
    return Net(
        partial(graph.GraphNet, depth=depth, **options),
        about,
        sites=graph.sites(depth),
        task="node_classification",
        error_at=error_at,
    )


_cifar_resnet = partial(ResNet, widths=(16, 32, 64), project=False)

NETS: dict[str, Net] = {
    "small_cnn": Net(
        small_cnn.SmallCNN,
        "2 conv + 2 fc with batch norm: the small net of the DKP authors (Webster et al. 2020, dkp-gist)",
        published_sites=small_cnn.PUBLISHED_SITES,
        min_side=6,
    ),
    "alexnet": Net(
        alexnet.AlexNet,
        "5 conv + 3 fc with batch norm: AlexNet (Krizhevsky 2014) as in dkp-gist; smaller stem up to 96 px",
        published_sites=alexnet.PUBLISHED_SITES,
        min_side=15,
    ),
    "vgg6": Net(
        partial(vgg.VGG, stages=vgg.STAGES_6, hidden=(128,)),
        "6 conv + 2 fc with batch norm: a VGG small enough for a CPU",
    ),
    "vgg11": Net(
        partial(vgg.VGG, stages=vgg.STAGES_11, hidden=(512, 512)),
        "8 conv + 3 fc with batch norm: VGG A (Simonyan and Zisserman 2015), 512-wide fc",
    ),
    "vgg13": Net(
        partial(vgg.VGG, stages=vgg.STAGES_13, hidden=(512, 512)),
        "10 conv + 3 fc with batch norm: VGG B (Simonyan and Zisserman 2015), 512-wide fc",
    ),
    "vgg16": Net(
        partial(vgg.VGG, stages=vgg.STAGES_16, hidden=(512, 512)),
        "13 conv + 3 fc with batch norm: VGG D (Simonyan and Zisserman 2015), 512-wide fc",
    ),
    "resnet18": Net(
        partial(ResNet, widths=(64, 128, 256, 512), depth=2, project=True),
        "17 conv + 1 fc, 1x1 shortcuts (He et al. 2016); 3x3 stem up to 64 px",
    ),
    "resnet20": Net(
        partial(_cifar_resnet, depth=3),
        "19 conv + 1 fc: CIFAR form, parameter-free shortcuts (He et al. 2016)",
    ),
    "resnet56": Net(
        partial(_cifar_resnet, depth=9),
        "55 conv + 1 fc: CIFAR form, parameter-free shortcuts (He et al. 2016)",
    ),
    "resnet110": Net(
        partial(_cifar_resnet, depth=18),
        "109 conv + 1 fc: CIFAR form, parameter-free shortcuts (He et al. 2016)",
    ),
    "mlp": Net(MLP, "4 fc, three hidden layers of 1000 ReLU units (after Nøkland 2016)"),
    "mlp64": Net(
        partial(MLP, hidden=(64,) * 3),
        "4 fc, three hidden layers of 64 ReLU units: too few to learn well without training them",
    ),
    "mlp64_tanh": Net(
        partial(MLP, hidden=(64,) * 3, activation=nn.Tanh),
        "mlp64 with tanh, which some rules need",
    ),
    "transformer_small": _transformer(4, 64),
    "transformer4": _transformer(4),
    "transformer6": _transformer(6),
    "transformer6_stages3": _transformer(6, stages=3),
    "gru": _recurrent(nn.GRU),
    "gru_steps": _recurrent(nn.GRU, steps=True),
    "lstm": _recurrent(nn.LSTM),
    "lstm_steps": _recurrent(nn.LSTM, steps=True),
    # the error of a node's neighbours is its own as well: it is taken before the last layer sums over them
    "gcn": _graph(
        "2 graph convolutions, 16 wide (Kipf and Welling 2017)",
        error_at="head.lin",
        conv=graph.gcn,
        width=16,
    ),
    "gcn4": _graph(
        "4 graph convolutions, 64 wide", depth=4, error_at="head.lin", conv=graph.gcn, width=64
    ),
    "gat": _graph(
        "2 layers of graph attention, 8 heads of 8 (Velickovic et al. 2018)",
        error_at="head.lin",
        conv=graph.gat,
        width=64,
        act=nn.ELU,
    ),
    "sage": _graph("2 GraphSAGE layers, 64 wide (Hamilton et al. 2017)", conv=graph.sage, width=64),
    "gin": _graph("2 GIN layers, 64 wide (Xu et al. 2019)", conv=graph.gin, width=64),
    **{
        f"music_{kind.__name__.lower()}{'_steps' if steps else ''}": _music(kind, steps)
        for steps in (False, True)
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
    },
    "field": Net(
        Field, "Fourier features and 4 fc, for the colours of a picture", task="regression"
    ),
    **{
        f"rows_{kind.__name__.lower()}{'_steps' if steps else ''}": _rows(kind, steps)
        for steps in (False, True)
        for kind in (nn.GRU, nn.LSTM)
    },
    **{
        f"sentence_{kind}": Net(
            partial(Sentences, attention=kind == "transformer"),
            f"2 {what} of width 64 over the words of a sentence, then their mean",
            sites=("layers.0", "layers.1"),
            task="sentences",
        )
        for kind, what in (("gru", "GRU layers"), ("transformer", "blocks of attention"))
    },
    "deepfm": Net(
        DeepFM,
        "a factorisation machine beside 3 fc, over the same embeddings (Guo et al. 2017), for clicks",
        task="recommendation",
    ),
}


def build(
    name: str,
    in_shape: tuple[int, ...],
    classes: int,
    norm: bool = True,
    task: str = "classification",
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The net `name` for images of `in_shape` (C, H, W): [N, C, H, W] -> [N, classes], or sequences (T,): [N, T] -> [N, T, classes].

    `name` is a key of `NETS`, or `package.module:callable`, `path/to/file.py:callable`, `timm:name` or `hf:type` for another
    model, which is given the `options` too. `norm=False` drops batch norm; convolutions then have a bias. Raises ConfigError for
    an unknown name, a net for another task, an unusable shape or options that the net does not have.
    """
    if task == "classification" and (len(in_shape) != 3 or min(in_shape) < 1):
        raise ConfigError(
            f"in_shape of the net {name!r} is {in_shape}, expected (channels, height, width) >= 1."
        )
    if classes < 2:
        raise ConfigError(f"classes of the net {name!r} is {classes}, expected at least 2.")
    if ":" in name:
        return build_custom(name, in_shape, classes, norm, task, options)
    net = _find(name)
    if options:
        raise ConfigError(
            f"the net {name!r} has no options, but model_options names {', '.join(options)}: they are for your own nets and those "
            "of timm: and hf:"
        )
    if net.task != task:
        fitting = ", ".join(key for key, other in NETS.items() if other.task == task)
        raise ConfigError(
            f"the net {name!r} is for task {net.task}, not {task}: choose {fitting}, or package.module:callable for your own."
        )
    if min(in_shape[1:], default=net.min_side) < net.min_side:
        raise ConfigError(
            f"the net {name!r} needs images of at least {net.min_side} x {net.min_side} px, got "
            f"{in_shape[1]} x {in_shape[2]}: its unpadded layers would leave nothing. "
            "Enlarge the images or choose vgg6."
        )
    return net.build(in_shape, classes, norm)


def default_error_at(name: str) -> str | None:
    """The module whose output's error is sent unless the user names another; None is the network's output."""
    return None if ":" in name else _find(name).error_at


def default_sites(name: str) -> tuple[str, ...] | str:
    """The sites used unless the user names others; `"layers"` for a model of the user's own."""
    return "layers" if ":" in name else _find(name).sites


def published_sites(name: str) -> tuple[str, ...]:
    """The module names at which the net's authors injected feedback. Raises ConfigError if there are none."""
    sites = None if ":" in name else _find(name).published_sites
    if sites is None:
        known = ", ".join(key for key, net in NETS.items() if net.published_sites)
        raise ConfigError(
            f"the net {name!r} has no published sites (only {known} have): use sites='layers'."
        )
    return sites


def _find(name: str) -> Net:
    if name in NETS:
        return NETS[name]
    near = difflib.get_close_matches(name.lower(), NETS, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(
        f"unknown net {name!r}. {hint}Known nets: {', '.join(NETS)}; or package.module:callable for your own, timm:name, hf:type."
    )
