"""The learning rules, by their command-line names: the map of this folder."""

from .base import Properties, Rule
from .bp import BP
from .dfa import DFA
from .dkp import DKP
from .frozen import Frozen

RULES: dict[str, type[Rule]] = {
    "bp": BP,
    "dfa": DFA,
    "dkp": DKP,
    "frozen": Frozen,
}

__all__ = ["BP", "DFA", "DKP", "RULES", "Frozen", "Properties", "Rule"]
