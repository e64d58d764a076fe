"""The learning rules: the map of this folder.

`RULES` has them by their names on the command line, and `COMPOSED` those that are made of other rules.

Example:
    >>> import feedbackward as fb
    >>> fb.rules.RULES["dfa"]().label
    'DFA'
"""

from feedbackward.rule import Rule
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
from feedbackward.rules.direct.segmented_kp import SegmentedKP
from feedbackward.rules.direct.shared_dfa import SharedDFA
from feedbackward.rules.direct.sign_dfa import SignDFA
from feedbackward.rules.direct.sparse_dfa import SparseDFA
from feedbackward.rules.local.auglocal import AugLocal
from feedbackward.rules.local.ccl import CCL
from feedbackward.rules.local.cwcomp import CwComp
from feedbackward.rules.local.dgl import DGL
from feedbackward.rules.local.infopro import InfoPro
from feedbackward.rules.local.lls import LLS
from feedbackward.rules.local.pepita import PEPITA
from feedbackward.rules.local.predsim import PredSim
from feedbackward.rules.mixed.cdfa import CDFA
from feedbackward.rules.mixed.han2020 import Han2020
from feedbackward.rules.mixed.mixed import Mixed
from feedbackward.rules.targets.ddtp import DDTP
from feedbackward.rules.targets.dtp import DTP
from feedbackward.rules.targets.lra import LRA
from feedbackward.rules.targets.rec_lra import RecLRA
from feedbackward.rules.targets.sdtp import SDTP
from feedbackward.schedules.dsp import DSP

# what we would use ourselves, and what it is compared with
RECOMMENDED: dict[str, type[Rule]] = {
    "dkp": DKP,
    "segmented_kp": SegmentedKP,
    "highway_kp": HighwayKP,
    "kp": KolenPollack,
    "dgl": DGL,
    "dfa": DFA,
}
CONTROLS: dict[str, type[Rule]] = {
    "bp": BP,
    "frozen": Frozen,
}
# published methods that others are measured against
BASELINES: dict[str, type[Rule]] = {
    "fa": FA,
    "usf": USF,
    "sign_symmetry": SignSymmetry,
    "weight_mirror": WeightMirror,
    "sparse_dfa": SparseDFA,
    "shared_dfa": SharedDFA,
    "drtp": DRTP,
    "fdfa": FDFA,
    "grape": GrAPE,
    "predsim": PredSim,
    "lls": LLS,
    "infopro": InfoPro,
    "auglocal": AugLocal,
    "ccl": CCL,
    "pepita": PEPITA,
    "dtp": DTP,
    "sdtp": SDTP,
    "ddtp": DDTP,
    "rec_lra": RecLRA,
    "dsp": DSP,
}
# methods that few build on, that were measured in another setting only, of which much had to be inferred, or that a recommended
# one has replaced
CONTRIB: dict[str, type[Rule]] = {
    "relayed_kp": RelayedKP,
    "brsf": BRSF,
    "frsf": FRSF,
    "binary_dfa": BinaryDFA,
    "pdfa": PDFA,
    "cdfa": CDFA,
    "han2020": Han2020,
    "kernel_dfa": KernelDFA,
    "sign_dfa": SignDFA,
    "ifa": IFA,
    "dkp_pc": DKPPC,
    "cwcomp": CwComp,
    "ebd": EBD,
    "information_alignment": InformationAlignment,
    "symmetric_alignment": SymmetricAlignment,
    "activation_alignment": ActivationAlignment,
    "self_alignment": SelfAlignment,
    "pfa": PFA,
    "lra": LRA,
}
TIERS: dict[str, dict[str, type[Rule]]] = {
    "recommended": RECOMMENDED,
    "control": CONTROLS,
    "baseline": BASELINES,
    "contrib": CONTRIB,
}
RULES: dict[str, type[Rule]] = {
    name: rule for tier in TIERS.values() for name, rule in tier.items()
}

# named as the rules are, but made of other rules
COMPOSED: dict[str, type[Rule]] = {"mixed": Mixed, "flipped": Flipped}

__all__ = [
    "BP",
    "BRSF",
    "CCL",
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
    "PEPITA",
    "PFA",
    "RULES",
    "SDTP",
    "TIERS",
    "USF",
    "ActivationAlignment",
    "AugLocal",
    "BinaryDFA",
    "CwComp",
    "Flipped",
    "Frozen",
    "GrAPE",
    "Han2020",
    "HighwayKP",
    "InfoPro",
    "InformationAlignment",
    "KernelDFA",
    "KolenPollack",
    "Mixed",
    "PredSim",
    "RecLRA",
    "RelayedKP",
    "Rule",
    "SegmentedKP",
    "SelfAlignment",
    "SharedDFA",
    "SignDFA",
    "SignSymmetry",
    "SparseDFA",
    "SymmetricAlignment",
    "WeightMirror",
]
