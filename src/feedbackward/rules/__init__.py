"""The learning rules, by their command-line names: the map of this folder."""

from .activation_alignment import ActivationAlignment
from .base import Properties, Rule
from .bp import BP
from .brsf import BRSF
from .dfa import DFA
from .dgl import DGL
from .dkp import DKP
from .drtp import DRTP
from .fa import FA
from .frozen import Frozen
from .frsf import FRSF
from .information_alignment import InformationAlignment
from .kolen_pollack import KolenPollack
from .mixed import Mixed
from .self_alignment import SelfAlignment
from .sign_symmetry import SignSymmetry
from .symmetric_alignment import SymmetricAlignment
from .usf import USF
from .weight_mirror import WeightMirror

RULES: dict[str, type[Rule]] = {
    "bp": BP,
    "fa": FA,
    "usf": USF,
    "brsf": BRSF,
    "frsf": FRSF,
    "sign_symmetry": SignSymmetry,
    "kp": KolenPollack,
    "dfa": DFA,
    "dkp": DKP,
    "drtp": DRTP,
    "dgl": DGL,
    "weight_mirror": WeightMirror,
    "information_alignment": InformationAlignment,
    "symmetric_alignment": SymmetricAlignment,
    "activation_alignment": ActivationAlignment,
    "self_alignment": SelfAlignment,
    "frozen": Frozen,
}

# named as the rules are, but made of other rules: what they need and cost is said by an instance
COMPOSED: dict[str, type[Rule]] = {"mixed": Mixed}

__all__ = [
    "BP",
    "BRSF",
    "COMPOSED",
    "DFA",
    "DGL",
    "DKP",
    "DRTP",
    "FA",
    "FRSF",
    "RULES",
    "USF",
    "ActivationAlignment",
    "Frozen",
    "InformationAlignment",
    "KolenPollack",
    "Mixed",
    "Properties",
    "Rule",
    "SelfAlignment",
    "SignSymmetry",
    "SymmetricAlignment",
    "WeightMirror",
]
