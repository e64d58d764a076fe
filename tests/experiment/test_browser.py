"""The report's page in a real browser: nothing wider than the screen, and figures that can be read."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_grid_report import results as grid_results
from test_report import SITES, make_results

from feedbackward.experiment.report.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None, reason="no Chromium on the path: install one to check the page"
    ),
]

# A page around the report, which holds no script itself: loads it in frames of given widths and measures.
HARNESS = """<!doctype html><body><pre id="found"></pre>
<script>
const found = [];
function measure(width, open) {
  return new Promise(done => {
    const frame = document.createElement("iframe");
    frame.style = `width:${width}px;height:800px;border:0`;
    frame.onload = () => {
      const page = frame.contentDocument, root = page.documentElement;
      if (open) page.querySelectorAll("details").forEach(item => item.open = true);
      const inScroller = item => item.closest(".scroll, pre");
      const wide = [...page.querySelectorAll("body *")].filter(
        item => !inScroller(item.parentElement) && !item.closest("svg svg, svg *") &&
                item.getBoundingClientRect().right > width + 0.5);
      found.push({
        width, open, scrollWidth: root.scrollWidth, clientWidth: root.clientWidth,
        wide: wide.map(item => item.outerHTML.slice(0, 80)),
        figures: [...page.querySelectorAll("svg")].map(item => item.getBoundingClientRect())
          .map(box => [Math.round(box.width), Math.round(box.height)]),
        letters: Math.min(...[...page.querySelectorAll("svg text")].map(
          item => parseFloat(frame.contentWindow.getComputedStyle(item).fontSize) * item.getScreenCTM().a)),
        tableScrolls: page.querySelector(".scroll").scrollWidth > page.querySelector(".scroll").clientWidth,
      });
      done();
    };
    document.body.append(frame);
    frame.src = "report.html";
  });
}
(async () => {
  for (const width of [360, 1280]) for (const open of [false, true]) await measure(width, open);
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script></body>"""


def browse(page, profile, *options):
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The report of results with long names, a long command and a long message."""
    sites = [*SITES[:-1], "module.encoder.layers.11.feed_forward.intermediate_activation"]
    results = make_results(sites=sites)
    results["command"] += " --data-root " + "a-very-long-folder-name/" * 8
    run = results["rules"][2]["runs"][1]
    run.update(status="diverged", test_accuracy=None, message="loss_became_NaN_at_" + "x" * 120)
    folder = tmp_path_factory.mktemp("page")
    write_report(results, folder)
    (folder / "harness.html").write_text(HARNESS)
    return folder


def measure(folder):
    """What the browser measures of the folder's page, one entry per width, with <details> closed and open."""
    options = ("--dump-dom", "--virtual-time-budget=20000", "--window-size=1400,900")
    dom = browse(folder / "harness.html", folder / "profile", *options)
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert [entry["width"] for entry in found] == [360, 360, 1280, 1280]
    return found


@pytest.fixture(scope="module")
def measured(folder):
    return measure(folder)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """What the browser measured of a study's page."""
    folder = tmp_path_factory.mktemp("study")
    write_report(grid_results(), folder)
    (folder / "harness.html").write_text(HARNESS)
    return measure(folder)


def test_a_studys_page_fits_every_width(study):
    for entry in study:
        assert entry["scrollWidth"] <= entry["clientWidth"], entry
        assert entry["wide"] == [], entry
        assert all(width >= 250 for width, _ in entry["figures"] if width), entry
    assert study[0]["letters"] >= 7
    assert study[2]["letters"] >= 10


def test_no_width_scrolls_sideways(measured):
    for entry in measured:
        assert entry["scrollWidth"] <= entry["clientWidth"], entry
        assert entry["wide"] == [], entry


def test_a_wide_table_scrolls_in_its_own_box(measured):
    assert measured[0]["tableScrolls"]


def test_every_figure_is_drawn_and_its_letters_can_be_read(measured):
    for entry in measured:
        assert len(entry["figures"]) == 7
        assert all(width >= 280 and height >= 150 for width, height in entry["figures"]), entry
    assert measured[0]["letters"] >= 7  # CSS pixels on a phone: the smallest of all figures
    assert measured[2]["letters"] >= 10


@pytest.mark.parametrize("width", [360, 1280])
def test_a_screenshot_can_be_taken(folder, tmp_path, width):
    picture = tmp_path / "page.png"
    options = (f"--screenshot={picture}", f"--window-size={width},1200", "--hide-scrollbars")
    browse(folder / "report.html", tmp_path / "profile", *options)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000  # an empty page takes 3 to 7 kB
