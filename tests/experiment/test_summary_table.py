"""The summary in the terminal and in a log file."""

import io

from rich.console import Console
from test_report import make_results

from feedbackward.experiment.report.report import print_report
from feedbackward.experiment.report.summary import conclusion
from feedbackward.experiment.report.tables import detailed as table


def printed(results, **options):
    stream = io.StringIO()
    print_report(results, Console(file=stream, **options))
    return stream.getvalue()


def test_the_terminal_table_fits_eighty_columns():
    text = printed(make_results(), force_terminal=True, width=80, color_system=None)
    assert "…" not in text
    for cell in ("85.6±0.2", "1.84 MB", "0.85×"):
        assert cell in text


def test_a_log_file_gets_whole_lines_and_no_colour():
    results = make_results()
    results["rules"][1]["label"] = "DKP [red]"  # square brackets are text, not markup
    lines = printed(results, width=80).splitlines()
    assert conclusion(results) in lines
    assert "\x1b" not in "".join(lines)
    cells = [
        cell.strip()
        for line in lines
        if line.startswith("| DKP [red]")
        for cell in line.strip("|").split("|")
    ]
    assert cells == [column[1] for column in table(results).values()]


def test_a_log_file_without_unicode_is_no_error():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_report(make_results(), Console(file=stream))
    stream.flush()
    assert "85.6 +/- 0.2" in raw.getvalue().decode("ascii")
