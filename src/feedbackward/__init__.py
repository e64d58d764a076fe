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
from .graph import Arc, Edge, Graph, Local, Site, Source, chain, ladder, star
from .learner import Learner, attach, param_groups
from .norms import keep_norms
from .operators import OPERATORS, Dense, LayerShaped, Operator, Shape, Weights
from .phase import Pass, Phase
from .probe import ParameterAlignment, Probe, SiteAlignment, probe
from .rules import (
    BP,
    BRSF,
    DFA,
    DGL,
    DKP,
    DRTP,
    FA,
    FRSF,
    RULES,
    USF,
    Frozen,
    KolenPollack,
    Mixed,
    Properties,
    Rule,
    SignSymmetry,
)
from .schedules import step_in_backward

__version__ = "0.1.0"

__all__ = [
    "BP",
    "BRSF",
    "DFA",
    "DGL",
    "DKP",
    "DRTP",
    "FA",
    "FRSF",
    "OPERATORS",
    "RULES",
    "USF",
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
    "Local",
    "Mixed",
    "Operator",
    "ParameterAlignment",
    "Pass",
    "Phase",
    "Probe",
    "Properties",
    "Rule",
    "Shape",
    "SignSymmetry",
    "Site",
    "SiteAlignment",
    "SiteError",
    "Source",
    "Weights",
    "attach",
    "chain",
    "keep_norms",
    "ladder",
    "param_groups",
    "probe",
    "star",
    "step_in_backward",
]
