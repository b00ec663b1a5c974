"""The report and the page of a comparison as Chromium shows them, on a wide and on a narrow window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_ligo.experiments.compare import comparison_page
from megatron_ligo.report import curves, report_page
from megatron_ligo.report.report_table import build_table
from tests.experiments.compare.test_comparison_page import collect
from tests.report.test_curves import made_up_runs

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
# What a reader sees: the widths of page and window, the pictures that have loaded, and cells whose text is cut.
MEASURE = """<script>
document.title = JSON.stringify({
  page: document.documentElement.scrollWidth,
  window: innerWidth,
  pictures: [...document.images].map(image => image.complete && image.naturalWidth),
  drawn: [...document.images].map(image => image.clientWidth),
  requests: performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length,
});
</script>"""


def report(folder: Path) -> str:
    runs = made_up_runs()
    return report_page.render_page(build_table(runs), curves.draw_png(runs))


def comparison(folder: Path) -> str:
    results = collect(folder, {})
    for name, arm in results["arms"].items():
        for run in arm["runs"]:
            run["curve"] = [(1e9 * step, 5.0 - step / 100 - 0.3 * (name != "scratch")) for step in range(1, 201)]
    pictures = (comparison_page.draw_curves(results), comparison_page.draw_whole_runs(results))
    return comparison_page.render_page(results, *pictures)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder, paths = tmp_path_factory.mktemp("pages"), {}
    for build in (report, comparison):
        paths[build.__name__] = folder / f"{build.__name__}.html"
        paths[build.__name__].write_text(build(folder).replace("</body>", f"{MEASURE}</body>"))
    return paths


def browse(page: Path, width: int, *options: str) -> str:
    """Opens a page in a window of this width; returns what the browser prints."""
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [BROWSER, *OPTIONS, profile, f"--window-size={width},1800", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


@pytest.mark.parametrize("width", [1400, 520])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_fits_its_window_and_fetches_nothing(name, width, pages):
    shown = browse(pages[name], width, "--dump-dom")
    measured = json.loads(unescape(re.search(r"<title>(.*?)</title>", shown)[1]))
    assert measured["window"] == width and measured["page"] <= width, measured
    assert measured["pictures"] and all(pixels > 1000 for pixels in measured["pictures"]), measured
    assert min(measured["drawn"]) > 800, "the text of a picture cannot be read"
    assert measured["requests"] == 0 and not re.findall(r'(?:src|href)="(?!data:)[^"]+"', shown)
    if name == "report":
        assert re.search(r"\d+% saved, the fit behind a start included", shown)


def test_the_browser_draws_the_page(pages, tmp_path):
    picture = tmp_path / "page.png"
    browse(pages["report"], 1400, f"--screenshot={picture}")
    pixels = imread(picture)
    assert pixels.shape[:2] == (1800, 1400) and pixels[..., :3].std() > 0.05
