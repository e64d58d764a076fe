"""Train PyTorch networks with feedback connections instead of backpropagation's transposed weights."""

from .errors import (
    AttachError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    FeedbackError,
    SiteError,
)
from .graph import Arc, Edge, Graph, Site, Source, chain, star
from .learner import Learner, attach, param_groups
from .operators import Dense, LayerShaped, Operator
from .probe import ParameterAlignment, Probe, SiteAlignment, probe
from .rules import BP, DFA, DKP, FA, RULES, Frozen, KolenPollack, Properties, Rule

__version__ = "0.1.0"

__all__ = [
    "BP",
    "DFA",
    "DKP",
    "FA",
    "RULES",
    "Arc",
    "AttachError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Dense",
    "DivergenceError",
    "Edge",
    "FeedbackError",
    "Frozen",
    "Graph",
    "KolenPollack",
    "LayerShaped",
    "Learner",
    "Operator",
    "ParameterAlignment",
    "Probe",
    "Properties",
    "Rule",
    "Site",
    "SiteAlignment",
    "SiteError",
    "Source",
    "attach",
    "chain",
    "param_groups",
    "probe",
    "star",
]
