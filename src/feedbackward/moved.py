"""Modules of 0.1.0 by their old names: each import works for one release, and says the new name."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# (old package, new package): names of modules, "old=new" where the name changed too
_PACKAGES = {
    ("experiment", "experiment.config"): ("arguments configfile=files parser recipes suggest"),
    ("experiment", "experiment.benchmark"): (
        "benchcases=cases benching=steps benchreport=cost_report costing=counted "
        "costreport=cost_report costs=step_costs"
    ),
    ("experiment", "experiment.training"): (
        "building checkpoint checkpointed diagnose environment inspect interrupts "
        "measure optimizing progress record refusal run runfolder train"
    ),
    ("experiment", "experiment.data"): ("cache decode decode_progress fashion_mini loader sources"),
    ("experiment", "experiment.grid"): ("compare search=candidates"),
    ("experiment", "experiment.report"): ("drawing heatmap plots summary"),
    ("rules", "rules.chain"): (
        "activation_alignment brsf concordant fa frsf information_alignment "
        "kolen_pollack layer_alignment pfa self_alignment sign_symmetry "
        "symmetric_alignment usf weight_mirror"
    ),
    ("rules", ""): ("base=rule"),
    ("rules", "rules.direct"): (
        "binary_dfa dfa dkp dkp_pc drtp ebd fdfa grape ifa kernel_dfa pdfa relayed_kp "
        "shared_dfa sign_dfa sparse_dfa"
    ),
    ("rules", "rules.controls"): ("bp flipped frozen"),
    ("rules", "rules.mixed"): ("cdfa han2020"),
    ("rules", "schedules"): ("dsp"),
    ("rules", "rules.targets"): ("ddtp decoding dtp lra rec_lra sdtp"),
    ("rules", "rules.local"): ("dgl"),
}


def _table() -> dict[str, str]:
    found = {}
    for (old_package, new_package), names in _PACKAGES.items():
        for name in names.split():
            old, _, new = name.partition("=")
            before = ".".join(filter(None, ("feedbackward", old_package, old)))
            found[before] = ".".join(filter(None, ("feedbackward", new_package, new or old)))
    return found


MOVED = _table()


class _Alias(Loader):
    """Gives the module of the new name for the old one: the same object."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} has moved to {new}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # it has run already; the import system has put the old name's spec in place of its own
        module.__spec__ = self.spec


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, _Alias()) if name in MOVED else None


def install() -> None:
    """Let the old names be imported. A second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
