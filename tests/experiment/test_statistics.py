"""Statistics of a comparison against hand-made numbers, and claims that go no further than they allow."""

import pytest
from test_report import small

from feedbackward.experiment.report.summary import conclusion, notes, summarise
from feedbackward.experiment.report.tables import detailed as table


def rows(results):
    return {row["rule"]: row for row in summarise(results)}


def test_statistics_equal_hand_computed_numbers():
    found = rows(small(bp=[90.0, 88.0, 89.0], dkp=[86.0, 85.0, 84.0], frozen=[60.0, 64.0, 62.0]))
    assert (found["dkp"]["mean"], found["dkp"]["n"], found["dkp"]["planned"]) == (85.0, 3, 3)
    assert found["dkp"]["std"] == pytest.approx(1.0)  # deviations 1, 0, -1: sqrt(2 / 2)
    gap = found["dkp"]["gap"]  # differences 4, 3, 5: mean 4, std 1, standard error 1 / sqrt(3)
    assert gap == {"mean": pytest.approx(4.0), "se": pytest.approx(3**-0.5), "n": 3}
    frozen = found["dkp"]["frozen"]  # differences 26, 21, 22: mean 23, std sqrt(14 / 2)
    assert frozen == {"mean": pytest.approx(23.0), "se": pytest.approx((7 / 3) ** 0.5), "n": 3}
    assert found["bp"]["gap"] is None
    assert found["frozen"]["frozen"] is None


def test_differences_are_paired_by_seed_not_by_position():
    results = small(bp=[90.0, 80.0], dkp=[70.0, 79.0])
    results["rules"][1]["runs"].reverse()
    assert rows(results)["dkp"]["gap"] == {
        "mean": pytest.approx(10.5),
        "se": pytest.approx(9.5),
        "n": 2,
    }


def test_mean_angle_is_over_sites_then_seeds_of_the_last_probe():
    results = small(dkp=[80.0, 80.0])
    first, second = results["rules"][0]["runs"]
    sites = {"a": {"angle": 40.0, "bp_norm": 1e-8}, "b": {"angle": 60.0, "bp_norm": 0.1}}
    first["alignment"] = [
        {"epoch": 2, "sites": sites},
        {"epoch": 1, "sites": {"a": {"angle": 90.0}}},
    ]
    second["alignment"] = [{"epoch": 2, "sites": {"a": {"angle": 70.0}, "b": {"angle": None}}}]
    row = rows(results)["dkp"]
    assert row["angle"] == pytest.approx((50.0 + 70.0) / 2)
    assert row["floor_sites"] == 1


def test_a_diverged_run_is_counted_and_named_but_not_averaged():
    results = small(bp=[90.0, 90.0, 90.0], dkp=[80.0, None, 84.0])
    results["rules"][1]["runs"][1]["message"] = "loss became NaN in epoch 2."
    row = rows(results)["dkp"]
    assert (row["mean"], row["n"], row["planned"], row["diverged"]) == (82.0, 2, 3, 1)
    assert row["gap"]["n"] == 2
    cells = table(results)
    assert (cells["n"], cells["Diverged"]) == (["3", "2/3"], ["–", "1"])
    assert "DKP, seed 1: diverged (loss became NaN in epoch 2); not counted in the mean." in notes(
        results
    )


CLAIMS = [
    (
        {
            "bp": [88.0, 89.0, 87.0],
            "dkp": [84.0, 84.5, 83.5],
            "dfa": [79.0, 80.0, 79.0],
            "frozen": [60.0] * 3,
        },
        "DKP reaches 84.0 % (BP 88.0 %, gap 4.0 ± 0.3 points over 3 seeds); "
        "it beats DFA and the frozen control.",
    ),
    (  # differences to DFA 1, -1, 1.5: mean 0.5, standard error 0.76
        {
            "bp": [90.0] * 3,
            "dkp": [80.0, 79.0, 81.5],
            "dfa": [79.0, 80.0, 80.0],
            "frozen": [60.0] * 3,
        },
        "DKP reaches 80.2 % (BP 90.0 %, gap 9.8 ± 0.7 points over 3 seeds); "
        "it beats the frozen control and it is not distinguishable from DFA.",
    ),
    (
        {"bp": [88.0], "dkp": [84.0]},
        "DKP reaches 84.0 % (BP 88.0 %, gap 4.0 points over one seed); "
        "one seed: no claim that it beats another rule.",
    ),
    (
        {"dkp": [84.0, 83.0], "frozen": [70.0, 71.0]},
        "DKP reaches 83.5 % over 2 seeds; 2 seeds: no claim that it beats another rule.",
    ),
    (
        {"bp": [88.0] * 3, "dkp": [84.0, 84.0, 84.0], "dfa": [79.0, None, 79.0]},
        "DKP reaches 84.0 % (BP 88.0 %, gap 4.0 ± 0.0 points over 3 seeds); "
        "too few common seeds for a claim about DFA.",
    ),
    (
        {"bp": [80.0, 81.0, 82.0], "dkp": [85.0, 86.0, 87.0]},
        "DKP reaches 86.0 % (BP 81.0 %, ahead by 5.0 ± 0.0 points over 3 seeds); it beats BP.",
    ),
    (
        {"dfa": [50.0, 51.0, 52.0], "frozen": [60.0, 61.0, 62.0]},
        "DFA reaches 51.0 % over 3 seeds; it falls behind the frozen control.",
    ),
    ({"bp": [88.0] * 3}, "BP reaches 88.0 % over 3 seeds."),
    ({"bp": [None], "dkp": []}, "No run has finished, so there is nothing to compare yet."),
]


@pytest.mark.parametrize(("accuracies", "expected"), CLAIMS)
def test_the_conclusion_claims_no_more_than_the_numbers_allow(accuracies, expected):
    assert conclusion(small(**accuracies)) == expected


def test_without_bp_there_is_no_gap_column_and_the_report_says_so():
    results = small(dkp=[80.0], dfa=[79.0])
    assert "Gap to BP" not in table(results)
    assert any("BP was not run" in note for note in notes(results))
    assert any("Frozen control was not run" in note for note in notes(results))


def test_a_rule_that_does_not_beat_frozen_is_named():
    results = small(bp=[90.0] * 3, dfa=[60.0, 61.0, 62.0], frozen=[61.0, 60.0, 62.0])
    assert any(note.startswith("DFA does not beat Frozen") for note in notes(results))
