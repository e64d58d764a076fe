"""Train PyTorch networks with direct, learned feedback instead of backpropagation."""

from .errors import (
    AttachError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    FeedbackError,
    SiteError,
)
from .graph import Edge, Graph, Site, Source, star
from .learner import Learner, attach, param_groups
from .operators import Dense, Operator
from .probe import ParameterAlignment, Probe, SiteAlignment, probe
from .rules import BP, DFA, DKP, RULES, Frozen, Properties, Rule

__version__ = "0.1.0"

__all__ = [
    "BP",
    "DFA",
    "DKP",
    "RULES",
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
    "param_groups",
    "probe",
    "star",
]
