"""The documentation as web pages, where Sphinx is installed: no warning, and the front page drawn by a browser."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from pages import DOCS, ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in ("sphinx", "furo", "latex2mathml", "myst_parser") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; `make docs` has a virtual environment for it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return folder


def test_pages_are_there(site: Path) -> None:
    for page in DOCS.glob("*.md"):
        assert (site / f"{page.stem}.html").stat().st_size > 1000, page
    # docstrings were found, formulas are mathematics
    assert 'id="spo_kernels.linear_logprob"' in (site / "api.html").read_text()
    assert (site / "objectives.html").read_text().count("<math ") > 200


def test_front_page_in_a_browser(site: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no headless browser: none of {', '.join(BROWSERS)} on PATH")
    picture = tmp_path / "front.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,1600"]
    run = subprocess.run(
        [browser, *options, f"--screenshot={picture}", f"file://{site}/index.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert picture.exists(), run.stderr
    pixels = pytest.importorskip("matplotlib.image").imread(picture)
    # a page that failed to load is of one colour
    assert pixels.shape[:2] == (1600, 1280) and pixels.std() > 0.05
