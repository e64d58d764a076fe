"""The learning rules: the map of this folder.

`RULES` has them by their names on the command line, and `COMPOSED` those that are made of other rules.

Example:
    >>> import feedbackward as fb
    >>> fb.rules.RULES["dfa"]().label
    'DFA'
"""

from feedbackward.rule import Properties, Rule
from feedbackward.rules.chain.activation_alignment import ActivationAlignment
from feedbackward.rules.chain.brsf import BRSF
from feedbackward.rules.chain.fa import FA
from feedbackward.rules.chain.frsf import FRSF
from feedbackward.rules.chain.information_alignment import InformationAlignment
from feedbackward.rules.chain.kolen_pollack import KolenPollack
from feedbackward.rules.chain.pfa import PFA
from feedbackward.rules.chain.self_alignment import SelfAlignment
from feedbackward.rules.chain.sign_symmetry import SignSymmetry
from feedbackward.rules.chain.symmetric_alignment import SymmetricAlignment
from feedbackward.rules.chain.usf import USF
from feedbackward.rules.chain.weight_mirror import WeightMirror
from feedbackward.rules.controls.bp import BP
from feedbackward.rules.controls.flipped import Flipped
from feedbackward.rules.controls.frozen import Frozen
from feedbackward.rules.direct.binary_dfa import BinaryDFA
from feedbackward.rules.direct.dfa import DFA
from feedbackward.rules.direct.dkp import DKP
from feedbackward.rules.direct.dkp_pc import DKPPC
from feedbackward.rules.direct.drtp import DRTP
from feedbackward.rules.direct.ebd import EBD
from feedbackward.rules.direct.fdfa import FDFA
from feedbackward.rules.direct.grape import GrAPE
from feedbackward.rules.direct.highway_kp import HighwayKP
from feedbackward.rules.direct.ifa import IFA
from feedbackward.rules.direct.kernel_dfa import KernelDFA
from feedbackward.rules.direct.pdfa import PDFA
from feedbackward.rules.direct.relayed_kp import RelayedKP
from feedbackward.rules.direct.shared_dfa import SharedDFA
from feedbackward.rules.direct.sign_dfa import SignDFA
from feedbackward.rules.direct.sparse_dfa import SparseDFA
from feedbackward.rules.local.dgl import DGL
from feedbackward.rules.local.lls import LLS
from feedbackward.rules.local.predsim import PredSim
from feedbackward.rules.mixed.cdfa import CDFA
from feedbackward.rules.mixed.dsp import DSP
from feedbackward.rules.mixed.han2020 import Han2020
from feedbackward.rules.mixed.mixed import Mixed
from feedbackward.rules.targets.ddtp import DDTP
from feedbackward.rules.targets.dtp import DTP
from feedbackward.rules.targets.lra import LRA
from feedbackward.rules.targets.rec_lra import RecLRA
from feedbackward.rules.targets.sdtp import SDTP

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
    "highway_kp": HighwayKP,
    "ebd": EBD,
    "dgl": DGL,
    "predsim": PredSim,
    "lls": LLS,
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
    "LLS",
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
    "HighwayKP",
    "InformationAlignment",
    "KernelDFA",
    "KolenPollack",
    "Mixed",
    "PredSim",
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
