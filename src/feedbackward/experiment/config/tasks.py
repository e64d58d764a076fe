"""What a task is to a config and to a report: how it counts, and the one measure that decides. It imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A measure of held-out data.

    Attributes:
        key: its name in results, after "test_" and "validation_".
        title: heading of a column.
        unit: follows the number, with a space where it needs one.
        falls: whether less is better.
        digits: how many follow the point where a report shows it.
    """

    key: str
    title: str
    unit: str = ""
    falls: bool = False
    digits: int = 2

    def value(self, run: dict[str, Any], split: str = "test") -> float | None:
        """The measure of a run, None where it has none."""
        return run.get(f"{split}_{self.key}")

    def record(self, result: dict[str, Any], epoch: dict[str, Any]) -> dict[str, Any]:
        """What the record of a run says: the measure of its result, and of its last epoch."""
        named = {} if self == ACCURACY else {"measure": self.key}
        tested, held_out = f"test_{self.key}", f"validation_{self.key}"
        return {**named, tested: result.get(tested), held_out: epoch.get(held_out)}

    def in_words(self, value: float, digits: int = 0, named: bool = False) -> str:
        """The value as text: "69.4 %", "perplexity 5.21"; with a unit it needs no name, unless it is to be `named`."""
        number = f"{value:.{max(digits, self.digits)}f}{self.unit}"
        return f"{self.title} {number}" if named or not self.unit else number

    @property
    def heading(self) -> str:
        """Heading of a column of test results."""
        return self.headed("Test")

    def headed(self, split: str) -> str:
        """Heading of what was measured on a split: "Test accuracy (%)"."""
        return f"{split} {self.title}" + (f" ({self.unit.strip()})" if self.unit else "")

    @property
    def points(self) -> str:
        """What follows a difference."""
        return " points" if self.unit == " %" else self.unit

    def better(self, value: float) -> float:
        """A number that is the larger the better the value is."""
        return -value if self.falls else value


@dataclass(frozen=True)
class Kind:
    """unit: what a step's N counts. measure: what rates are picked by. recipe: what "default" stands for."""

    unit: str
    measure: Measure
    recipe: str


ACCURACY = Measure("accuracy", "accuracy", " %", digits=1)
PERPLEXITY = Measure("perplexity", "perplexity", falls=True)
# the negative log-likelihood of a frame
NLL = Measure("nll", "NLL", " nats", falls=True)
PSNR = Measure("psnr", "PSNR", " dB")
# the binary cross-entropy of a click
LOG_LOSS = Measure("log_loss", "log loss", " nats", falls=True, digits=4)
KINDS = {
    "classification": Kind("images", ACCURACY, "default"),
    "language_model": Kind("tokens", PERPLEXITY, "language_model"),
    "node_classification": Kind("nodes", ACCURACY, "node_classification"),
    "music": Kind("frames", NLL, "music"),
    "regression": Kind("pixels", PSNR, "regression"),
    "sentences": Kind("sentences", ACCURACY, "sentences"),
    "recommendation": Kind("impressions", LOG_LOSS, "recommendation"),
}


def measure_of(run: dict[str, Any]) -> Measure:
    """The measure by which a run of any task is judged; `run_record` names it, older results do not."""
    return next(
        (k.measure for k in KINDS.values() if k.measure.key == run.get("measure")), ACCURACY
    )


def value_of(run: dict[str, Any], split: str = "test") -> float | None:
    """The measure by which a run is judged, None where it has none."""
    return measure_of(run).value(run, split)


def goodness(run: dict[str, Any], split: str = "test") -> float:
    """A number that is the larger the better a run is; for a run that has its measure."""
    value = value_of(run, split)
    assert value is not None
    return measure_of(run).better(value)
