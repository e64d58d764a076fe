"""The learning rules, by their command-line names: the map of this folder."""

from .activation_alignment import ActivationAlignment
from .base import Properties, Rule
from .binary_dfa import BinaryDFA
from .bp import BP
from .brsf import BRSF
from .cdfa import CDFA
from .ddtp import DDTP
from .dfa import DFA
from .dgl import DGL
from .dkp import DKP
from .dkp_pc import DKPPC
from .drtp import DRTP
from .dsp import DSP
from .dtp import DTP
from .ebd import EBD
from .fa import FA
from .fdfa import FDFA
from .flipped import Flipped
from .frozen import Frozen
from .frsf import FRSF
from .grape import GrAPE
from .han2020 import Han2020
from .ifa import IFA
from .information_alignment import InformationAlignment
from .kernel_dfa import KernelDFA
from .kolen_pollack import KolenPollack
from .lra import LRA
from .mixed import Mixed
from .pdfa import PDFA
from .pfa import PFA
from .rec_lra import RecLRA
from .relayed_kp import RelayedKP
from .sdtp import SDTP
from .self_alignment import SelfAlignment
from .shared_dfa import SharedDFA
from .sign_dfa import SignDFA
from .sign_symmetry import SignSymmetry
from .sparse_dfa import SparseDFA
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
    "shared_dfa": SharedDFA,
    "sparse_dfa": SparseDFA,
    "binary_dfa": BinaryDFA,
    "pdfa": PDFA,
    "cdfa": CDFA,
    "han2020": Han2020,
    "kernel_dfa": KernelDFA,
    "ifa": IFA,
    "dkp": DKP,
    "dkp_pc": DKPPC,
    "drtp": DRTP,
    "sign_dfa": SignDFA,
    "fdfa": FDFA,
    "grape": GrAPE,
    "relayed_kp": RelayedKP,
    "ebd": EBD,
    "dgl": DGL,
    "weight_mirror": WeightMirror,
    "information_alignment": InformationAlignment,
    "symmetric_alignment": SymmetricAlignment,
    "activation_alignment": ActivationAlignment,
    "self_alignment": SelfAlignment,
    "pfa": PFA,
    "dtp": DTP,
    "sdtp": SDTP,
    "ddtp": DDTP,
    "lra": LRA,
    "rec_lra": RecLRA,
    "dsp": DSP,
    "frozen": Frozen,
}

# named as the rules are, but made of other rules: what they need and cost is said by an instance
COMPOSED: dict[str, type[Rule]] = {"mixed": Mixed, "flipped": Flipped}

__all__ = [
    "BP",
    "BRSF",
    "CDFA",
    "COMPOSED",
    "DDTP",
    "DFA",
    "DGL",
    "DKP",
    "DKPPC",
    "DRTP",
    "DSP",
    "DTP",
    "EBD",
    "FA",
    "FDFA",
    "FRSF",
    "IFA",
    "LRA",
    "PDFA",
    "PFA",
    "RULES",
    "SDTP",
    "USF",
    "ActivationAlignment",
    "BinaryDFA",
    "Flipped",
    "Frozen",
    "GrAPE",
    "Han2020",
    "InformationAlignment",
    "KernelDFA",
    "KolenPollack",
    "Mixed",
    "Properties",
    "RecLRA",
    "RelayedKP",
    "Rule",
    "SelfAlignment",
    "SharedDFA",
    "SignDFA",
    "SignSymmetry",
    "SparseDFA",
    "SymmetricAlignment",
    "WeightMirror",
]
