"""Train PyTorch networks with feedback connections instead of backpropagation's transposed weights.

What most users need is here. Everything else is in `fb.rules`, `fb.operators`, `fb.topologies`,
`fb.parallel` and `fb.errors`.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from feedbackward import moved

if TYPE_CHECKING:
    from feedbackward import errors, operators, parallel, rules, topologies
    from feedbackward.activity import LayerInput, Site, Source
    from feedbackward.attaching import attach
    from feedbackward.errors import AttachError, FeedbackError, SiteError
    from feedbackward.graph import Edge, Graph
    from feedbackward.learner import Learner
    from feedbackward.measure.cost import Cost, count_cost
    from feedbackward.measure.probe import Probe, probe
    from feedbackward.operators import (
        Dense,
        LowRank,
        Operator,
        PerShape,
        Pooled,
        Shape,
        Sparse,
        Weights,
    )
    from feedbackward.optim import param_groups, renormalize_weights, step_in_backward
    from feedbackward.rules import (
        BP,
        DFA,
        DGL,
        DKP,
        DRTP,
        FA,
        RULES,
        Frozen,
        HighwayKP,
        KolenPollack,
        Mixed,
        Rule,
        SegmentedKP,
    )
    from feedbackward.schedules.delayed import Delayed
    from feedbackward.topologies import chain, star
    from feedbackward.unrolled import unroll

__version__ = "0.2.0"

moved.install()

# PyTorch is imported when the first of these names is used: `feedbackward --help` needs none
_PUBLIC_IN = {
    "feedbackward.errors": "AttachError FeedbackError SiteError",
    "feedbackward.activity": "LayerInput Site Source",
    "feedbackward.graph": "Edge Graph",
    "feedbackward.attaching": "attach",
    "feedbackward.learner": "Learner",
    "feedbackward.measure.cost": "Cost count_cost",
    "feedbackward.measure.probe": "Probe probe",
    "feedbackward.operators": "Dense LowRank Operator PerShape Pooled Shape Sparse Weights",
    "feedbackward.optim": "param_groups renormalize_weights step_in_backward",
    "feedbackward.rules": """
        BP DFA DGL DKP DRTP FA RULES Frozen HighwayKP KolenPollack Mixed Rule SegmentedKP
    """,
    "feedbackward.schedules.delayed": "Delayed",
    "feedbackward.topologies": "chain star",
    "feedbackward.unrolled": "unroll",
}
_PUBLIC = {name: home for home, names in _PUBLIC_IN.items() for name in names.split()}
_MODULES = ("errors", "operators", "parallel", "rules", "topologies")

# names of 0.1.0 that the top level no longer has, by the module that has them
_MOVED_TO = {
    "feedbackward.rules": """
        ActivationAlignment BRSF BinaryDFA CDFA DDTP DKPPC DSP DTP EBD FDFA FRSF Flipped GrAPE Han2020
        IFA InformationAlignment KernelDFA LRA PDFA PFA RecLRA RelayedKP SDTP SelfAlignment SharedDFA SignDFA
        SignSymmetry SparseDFA SymmetricAlignment USF WeightMirror
    """,
    "feedbackward.operators": "Binary Kernel LayerKernel LayerShaped OPERATORS Seeded Shared",
    "feedbackward.errors": "CheckpointError ConfigError DataError DivergenceError",
    "feedbackward.topologies": "ladder modules",
    "feedbackward.engine.phase": "Pass Phase",
    "feedbackward.measure.probe": "ParameterAlignment SiteAlignment",
    "feedbackward.graph": "Local UpwardEdge",
}
_RENAMED = {
    "Arc": ("feedbackward", "LayerInput"),
    "Lift": ("feedbackward.graph", "UpwardEdge"),
    "Stale": ("feedbackward", "Delayed"),
    "cost": ("feedbackward", "count_cost"),
    "keep_norms": ("feedbackward", "renormalize_weights"),
}
_GONE = {
    "Properties": "a rule says `learned`, `transport` and `unlocked` as fields of its class; costs are counted",
}
_MOVED = {name: (home, name) for home, names in _MOVED_TO.items() for name in names.split()}
_MOVED |= _RENAMED


def __getattr__(name: str) -> Any:
    """The public names at their first use, and for one release the names of 0.1.0."""
    if name in _PUBLIC or name in _MODULES:
        module = import_module(_PUBLIC.get(name, f"feedbackward.{name}"))
        return globals().setdefault(name, getattr(module, name, module))
    if name in _GONE:
        raise AttributeError(f"feedbackward.{name} is gone: {_GONE[name]}.")
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, new = _MOVED[name]
    warnings.warn(
        f"feedbackward.{name} will be removed in the next release: write {home}.{new}.",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(import_module(home), new)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "BP",
    "DFA",
    "DGL",
    "DKP",
    "DRTP",
    "FA",
    "RULES",
    "AttachError",
    "Cost",
    "Delayed",
    "Dense",
    "Edge",
    "FeedbackError",
    "Frozen",
    "Graph",
    "HighwayKP",
    "KolenPollack",
    "LayerInput",
    "Learner",
    "LowRank",
    "Mixed",
    "Operator",
    "PerShape",
    "Pooled",
    "Probe",
    "Rule",
    "SegmentedKP",
    "Shape",
    "Site",
    "SiteError",
    "Source",
    "Sparse",
    "Weights",
    "attach",
    "chain",
    "count_cost",
    "errors",
    "operators",
    "parallel",
    "param_groups",
    "probe",
    "renormalize_weights",
    "rules",
    "star",
    "step_in_backward",
    "topologies",
    "unroll",
]
