"""What a comparison's numbers say: statistics per rule, and sentences that claim no more than they allow."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from feedbackward.errors import FeedbackError
from feedbackward.experiment.config.tasks import Measure, goodness, measure_of, value_of

VERSION = 1
FLOOR = 1e-7  # below this gradient norm of BP an angle is rounding error, not a measurement
CONTROLS = ("bp", "frozen")  # rules without hidden feedback: no angle worth a panel of its own
MIN_SEEDS = 3  # fewer paired seeds than this support no claim

Results = dict[str, Any]


def clean(results: Results) -> Results:
    """A copy of `results` with every NaN or infinity replaced by None (JSON has neither).

    Raises FeedbackError for another schema version than 1.
    """
    if results.get("version") != VERSION:
        raise FeedbackError(
            f"The results have schema version {results.get('version')!r}, but this report reads version "
            f"{VERSION}: another feedbackward wrote them. Use that one, or run `feedbackward compare` again."
        )
    found = _finite(results)
    return {**found, "rules": found.get("rules") or [], "sites": found.get("sites") or []}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def done_runs(rule: Results) -> list[Results]:
    """The runs that finished and were tested; means are over these alone."""
    return [
        r for r in rule.get("runs") or [] if r.get("status") == "done" and value_of(r) is not None
    ]


def measure_of_rule(rule: Results) -> Measure:
    """The measure by which a rule's runs are judged."""
    return measure_of(next(iter(rule.get("runs") or []), {}))


def lost_runs(rule: Results) -> list[Results]:
    """The runs that are not done: diverged, running, missing."""
    done = [id(run) for run in done_runs(rule)]
    return [run for run in rule.get("runs") or [] if id(run) not in done]


def shown_runs(rule: Results) -> list[Results]:
    """The runs that figures of the alignment show: the finished ones, or all while there is none."""
    return done_runs(rule) or rule.get("runs") or []


def has_feedback(rule: Results) -> bool:
    """Whether hidden layers get a teaching signal other than backprop's."""
    return rule.get("rule") not in CONTROLS


def label_of(rule: Results) -> str:
    """The rule's name for people."""
    return str(rule.get("label") or rule.get("rule"))


def last_probe(run: Results) -> Results:
    """The latest entry of the run's alignment; empty where it was never probed."""
    return max(run.get("alignment") or [{}], key=lambda probe: probe.get("epoch", -1))


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there; None where there is none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def paired(first: Results | None, second: Results | None) -> dict[str, Any] | None:
    """By how much `first` is better than `second` on the test data, paired by seed (points of accuracy, or perplexity).

    Returns {"mean", "se", "n"}; the standard error `se` is None for one pair; None without a common seed.
    """
    if first is None or second is None or first is second:
        return None
    other = {run["seed"]: goodness(run) for run in done_runs(second)}
    differences = [goodness(r) - other[r["seed"]] for r in done_runs(first) if r["seed"] in other]
    n = len(differences)
    if n == 0:
        return None
    return {
        "mean": fmean(differences),
        "se": stdev(differences) / math.sqrt(n) if n > 1 else None,
        "n": n,
    }


def verdict(difference: dict[str, Any] | None) -> str:
    """One of "beats", "behind", "level" (twice the standard error decides); "no claim" below three seeds."""
    if difference is None or difference["n"] < MIN_SEEDS:
        return "no claim"
    if abs(difference["mean"]) <= 2 * difference["se"]:
        return "level"
    return "beats" if difference["mean"] > 0 else "behind"


def control(results: Results, name: str) -> Results | None:
    """The first rule called `name` ("bp" or "frozen"), if it was run; one without backprop steps goes before."""
    named = [rule for rule in results["rules"] if rule.get("rule") == name]
    return min(named, key=lambda rule: bool(rule.get("calibrate_every")), default=None)


def summarise(results: Results) -> list[dict[str, Any]]:
    """One row per rule, in the order given.

    Keys: rule, label, n (finished runs), planned, refused (the reason why there are no runs, else None), diverged,
    measure (the key of what is tested), its mean and std (sample standard deviation, None for n = 1), gap (by how much BP is better)
    and frozen (by how much the rule is better than Frozen), both as `paired` gives them, step_ratio and peak_ratio (to
    BP), angle (degrees, mean over sites and seeds at the last probe), floor_sites (sites whose BP gradient norm is then
    below 1e-7 in some seed), feedback_bytes, cost (counted: steps, macs relative to BP).
    """
    results = clean(results)
    bp, frozen = control(results, "bp"), control(results, "frozen")
    return [_row(rule, bp, frozen) for rule in results["rules"]]


def _row(rule: Results, bp: Results | None, frozen: Results | None) -> dict[str, Any]:
    runs, done = rule.get("runs") or [], done_runs(rule)
    scores = [value for run in done if (value := value_of(run)) is not None]
    probes = [last_probe(run).get("sites") or {} for run in done]
    return {
        "rule": rule.get("rule"),
        "label": label_of(rule),
        "n": len(done),
        "planned": len(runs),
        "refused": rule.get("refused"),
        "diverged": sum(run.get("status") == "diverged" for run in runs),
        "measure": measure_of_rule(rule).key,
        "mean": mean_of(scores),
        "std": stdev(scores) if len(scores) > 1 else None,
        "gap": paired(bp, rule),
        "frozen": paired(rule, frozen),
        "step_ratio": rule.get("step_ratio"),
        "peak_ratio": rule.get("peak_ratio"),
        "angle": mean_of(mean_of(site.get("angle") for site in probe.values()) for probe in probes),
        "floor_sites": len(
            {name for probe in probes for name, site in probe.items() if at_floor(site)}
        ),
        "feedback_bytes": rule.get("feedback_bytes"),
        "cost": rule.get("cost"),
    }


def sites_of(rule: Results) -> list[str]:
    """The rule's own sites, the input first: chains and relays have other names for them."""
    probes = [probe for run in shown_runs(rule) for probe in run.get("alignment") or []]
    return list(dict.fromkeys(site for probe in probes for site in probe.get("sites") or {}))


def at_floor(entry: Results) -> bool:
    """Whether BP's gradient there is too small for its direction to mean anything."""
    norm = entry.get("bp_norm")
    return norm is not None and norm < FLOOR


def conclusion(results: Results) -> str:
    """One plain sentence: how near the best rule comes to BP, and what it can be said to beat."""
    results = clean(results)
    rules = [rule for rule in results["rules"] if done_runs(rule)]
    if not rules:
        return "No run has finished, so there is nothing to compare yet."
    candidates = [rule for rule in rules if has_feedback(rule)] or rules
    measure = measure_of_rule(rules[0])
    best = max(candidates, key=lambda rule: measure.better(_mean(rule)))
    return f"{_subject(best)} reaches {measure.in_words(_mean(best))} {_against_bp(best, results)}{_verdicts(best, rules)}."


def _mean(rule: Results) -> float:
    return fmean(value for run in done_runs(rule) if (value := value_of(run)) is not None)


def _subject(rule: Results) -> str:
    return "the frozen control" if rule.get("rule") == "frozen" else label_of(rule)


def _seeds(n: int) -> str:
    return "one seed" if n == 1 else f"{n} seeds"


def _against_bp(rule: Results, results: Results) -> str:
    bp, n = control(results, "bp"), len(done_runs(rule))
    gap = paired(bp, rule)
    if bp is None or gap is None:
        return f"over {_seeds(n)}"
    measure = measure_of_rule(bp)
    error = "" if gap["se"] is None else f" ± {gap['se']:.{measure.digits}f}"
    side = "gap" if gap["mean"] >= 0 else "ahead by"
    points = f"{side} {abs(gap['mean']):.{measure.digits}f}{error}{measure.points}"
    return f"({_subject(bp)} {measure.in_words(_mean(bp))}, {points} over {_seeds(gap['n'])})"


def _verdicts(best: Results, rules: list[Results]) -> str:
    differences = [(rule, paired(best, rule)) for rule in rules if rule is not best]
    if not differences:
        return ""
    counts = [difference["n"] if difference else 0 for _, difference in differences]
    if max(counts) < MIN_SEEDS:
        seeds = _seeds(max(counts)) if max(counts) else "no common seed"
        return f"; {seeds}: no claim that it beats another rule"
    groups: dict[str, list[str]] = {}
    for rule, difference in differences:
        if (
            rule.get("rule") != "bp" or verdict(difference) != "behind"
        ):  # the gap in brackets says that already
            groups.setdefault(verdict(difference), []).append(_subject(rule))
    words = {
        "beats": "it beats {}",
        "level": "it is not distinguishable from {}",
        "behind": "it falls behind {}",
    }
    parts = [text.format(_listing(groups[key])) for key, text in words.items() if key in groups]
    claims = [_listing(parts)] if parts else []
    if "no claim" in groups:
        claims.append(f"too few common seeds for a claim about {_listing(groups['no claim'])}")
    return "".join(f"; {claim}" for claim in claims)


def _listing(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def notes(results: Results) -> list[str]:
    """What to know before trusting the table: missing controls, lost runs, unproven or noisy numbers."""
    results = clean(results)
    found = []
    if control(results, "bp") is None:
        found.append("BP was not run, so no gap to backprop is given.")
    if control(results, "frozen") is None:
        found.append(
            "The Frozen control was not run, so nothing here shows that hidden layers learn."
        )
    found += rule_notes(results["rules"])
    for row in filter(has_feedback, summarise(results)):
        label, count = row["label"], row["floor_sites"]
        if verdict(row["frozen"]) in ("level", "behind"):
            found.append(
                f"{label} does not beat Frozen: it has not been shown to train its hidden layers."
            )
        if count:
            sites = "one site" if count == 1 else f"{count} sites"
            found.append(
                f"{label}: at {sites} BP's gradient norm is below 1e-7 at the last probe; the angle there is "
                "rounding error, though the mean angle counts it."
            )
    return found


def rule_notes(
    rules: list[Results], states: Sequence[Any] | None = None, where: str = ""
) -> list[str]:
    """Rules that were refused or trained in another way, and runs that were lost (in these states)."""
    found = [
        f"{label_of(rule)} was refused: {rule['refused']}" for rule in rules if rule.get("refused")
    ]
    found += conditions(rules)
    for rule in rules:
        for run in lost_runs(rule):
            if states is None or run.get("status") in states:
                name = ", ".join(filter(None, (where, label_of(rule))))
                found.append(f"{name}, seed {run.get('seed')}: {_lost(run)}")
    return found


def conditions(rules: list[Results]) -> list[str]:
    """What is different in the training loop of some rules, and must be known with their numbers."""
    found = [
        f"{label_of(rule)}: one step in {rule['calibrate_every']} is by exact backprop, which transports the forward weights."
        for rule in rules
        if rule.get("calibrate_every") and rule.get("rule") != "bp"
    ]
    for rule in rules:
        if rule.get("backward_steps"):
            where = ", taken at weights predicted for then" if rule.get("predict_weights") else ""
            found.append(
                f"{label_of(rule)}: an update waits for at most {rule['backward_steps']} products in sequence; the gradients of the "
                f"layers below arrive late, as in a pipeline{where}."
            )
    return found


def _lost(run: Results) -> str:
    status = run.get("status")
    reason = {"running": "still running", "done": f"no test {measure_of(run).title}"}.get(
        str(status), str(status)
    )
    message = f" ({str(run['message']).rstrip('.')})" if run.get("message") else ""
    return f"{reason}{message}; not counted in the mean."
