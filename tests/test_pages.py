"""Pages hold together: links lead somewhere, every page is listed, messages that are quoted are in the code."""

import ast
import json
import re
from functools import cache
from pathlib import Path

import pages
import pytest
from pages import DOCS, ROOT, every_page
from shell_lines import CHECKS, commands

from spo_kernels import __version__
from spo_kernels.backends import environment

LANGUAGES = {"python", "bash", "text", "{eval-rst}", "{include}", "{toctree}"}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in pages.links(page):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in pages.anchors(file), link


@every_page
def test_every_block_has_a_language(page: Path) -> None:
    assert {block.split("\n")[0] for block in pages.blocks(page)} <= LANGUAGES


@pytest.mark.parametrize(
    "page", [page for page in pages.PAGES if pages.blocks(page, "bash")], ids=lambda page: page.stem
)
def test_commands_are_understood(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in pages.blocks(page, "bash"):
        for program, *words in commands(block):
            try:
                CHECKS[program](words)
            except SystemExit:
                pytest.fail(f"{program} {' '.join(words)}: {capsys.readouterr().err}")


def test_every_page_is_listed() -> None:
    listed = set("\n".join(pages.blocks(DOCS / "index.md", "{toctree}")).split())
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= listed


@cache
def texts() -> tuple[str, ...]:
    """Every string of the package, with … for what is filled in, white space made one."""
    found = []
    for path in sorted((ROOT / "spo_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append(" ".join("".join(parts).split()))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(" ".join(node.value.split()))
    return tuple(found)


@pytest.mark.parametrize("quoted", pages.blocks(DOCS / "faq.md", "text"))
def test_messages_are_those_of_the_code(quoted: str) -> None:
    assert any(quoted.strip() in text for text in texts())


def test_every_variable_is_on_its_page() -> None:
    named = set(re.findall(r"^([A-Z_]{3,})  ", environment.__doc__ or "", re.MULTILINE))
    assert named == set(re.findall(r"^\| `(\w+)` \|", (DOCS / "environment.md").read_text(), re.MULTILINE))


def test_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


@pytest.mark.parametrize("page", ["README.md", "docs/accuracy.md"])
def test_figures_of_the_real_model(page: str) -> None:
    report = json.loads((DOCS / "real-model.json").read_text())
    text = (ROOT / page).read_text()
    for way in report["errors"].values():
        # the plain way of figures that would otherwise have an exponent
        assert f"{way['sum']:.2g} nat" in text or f"{way['sum']:.5f} nat" in text


def test_figures_of_whole_steps() -> None:
    """README's table, and the page's, are what the command wrote."""
    report = json.loads((DOCS / "training-speed.json").read_text())
    readme = (ROOT / "README.md").read_text()
    page = (DOCS / "training-speed.md").read_text()
    for row in report["rows"]:
        assert f"{row['pairs_per_second']:.2f}, {row['above_floor_mib']:.0f}" in readme, row["provider"]
        assert f"| {row['pairs_per_second']:.2f} |" in page and f"| {row['above_floor_mib']:.0f} |" in page


def test_numbers_of_the_picture() -> None:
    """Over the bars of the picture in README stands what the command wrote."""
    report = json.loads((DOCS / "training-speed.json").read_text())
    picture = (DOCS / "training-speed.svg").read_text()
    assert "docs/training-speed.svg" in (ROOT / "README.md").read_text()
    bars = re.findall(r"font-size: 7px[^>]*>(\d+)<", picture)
    keys = ("tokens_per_second", "above_floor_mib")
    assert sorted(bars) == sorted(f"{row[key]:.0f}" for row in report["rows"] for key in keys)


def test_make_docs_installs_what_the_extra_names() -> None:
    extra = re.search(r"^docs = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    installed = re.search(r"numpy filelock (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert extra and installed and installed[1].split() == json.loads(extra[1])


def test_one_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {__version__} - " in (ROOT / "CHANGELOG.md").read_text()
