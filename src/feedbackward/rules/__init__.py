"""The learning rules, by their command-line names: the map of this folder."""

from .base import Properties, Rule
from .bp import BP
from .dfa import DFA
from .dgl import DGL
from .dkp import DKP
from .drtp import DRTP
from .fa import FA
from .frozen import Frozen
from .kolen_pollack import KolenPollack
from .mixed import Mixed

RULES: dict[str, type[Rule]] = {
    "bp": BP,
    "fa": FA,
    "kp": KolenPollack,
    "dfa": DFA,
    "dkp": DKP,
    "drtp": DRTP,
    "dgl": DGL,
    "frozen": Frozen,
}

# named as the rules are, but made of other rules: what they need and cost is said by an instance
COMPOSED: dict[str, type[Rule]] = {"mixed": Mixed}

__all__ = [
    "BP",
    "COMPOSED",
    "DFA",
    "DGL",
    "DKP",
    "DRTP",
    "FA",
    "RULES",
    "Frozen",
    "KolenPollack",
    "Mixed",
    "Properties",
    "Rule",
]
