"""docs/objectives.md or unverified.md has a row for every registered name: hyperparameters, defaults and coupling."""

import dataclasses
import re
from pathlib import Path

import pytest

import spo_kernels
from spo_kernels.losses import LOSSES, build_loss, needs_inputs, needs_reference

from .cases import CASES

DOCS = Path(spo_kernels.__file__).parents[1] / "docs"
PAGE, UNVERIFIED = DOCS / "objectives.md", DOCS / "unverified.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="an installed package has no docs")


def table(page, columns):
    """The rows of a page's tables with so many columns."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.read_text().splitlines()]
    return [[cell.strip() for cell in cells] for cells in lines if len(cells) == columns]


def rows(*pages):
    """Table rows by the names in their first cell."""
    found = {}
    for page in pages or (PAGE, UNVERIFIED):
        for cells in table(page, 8):
            found.update({name: cells for name in re.findall(r"`(\w+)`", cells[0])})
    return found


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_row_for_every_name(name):
    assert name in rows(), f"{name} has no row"
    cells = rows()[name]
    assert re.search("verified|third-party|reconstructed|inferred", cells[7])
    for field in dataclasses.fields(LOSSES[name]):
        if not field.init:
            continue
        assert f"`{field.name}`" in cells[4], field.name
        default = getattr(build_loss(name), field.name)
        if isinstance(default, bool | str):
            assert str(default).lower() in cells[4], (field.name, default)
        elif isinstance(default, float):
            numbers = {float(number) for number in re.findall(r"(?<![\w.])[\d.]*\d(?:e-?\d+)?(?![\w.])", cells[4])}
            assert default in numbers, (field.name, default)
    coupling = build_loss(name).coupling
    assert coupling in cells[6] or "base's" in cells[6] or cells[6] == "theirs", coupling
    assert ("state" in cells[6]) == (hasattr(LOSSES[name], "state_dict") and hasattr(build_loss(name), "state"))


def test_what_is_not_verified_has_its_row_on_its_page():
    for name in LOSSES:
        reconstructed = LOSSES[name].__module__.startswith("spo_kernels.losses.reconstructed.")
        assert name in rows(UNVERIFIED if reconstructed else PAGE)
        assert name not in rows(PAGE if reconstructed else UNVERIFIED)


def test_the_choice_says_what_each_costs():
    """Reference and products are those that the objective's code has."""
    chosen = 0
    for _, names, _, reference, products, _ in table(PAGE, 6):
        for name in re.findall(r"`(\w+)`", names):
            objective = build_loss(name)
            chosen += 1
            assert (reference == "-") == (not needs_reference(objective)), name
            four = objective.coupling == "batch" or "kl" in (getattr(objective, "token_outputs", ()) or ())
            assert products == ("4" if four else "3"), name
    assert chosen > 25


def test_every_input_is_named():
    text = PAGE.read_text() + UNVERIFIED.read_text()
    for case in CASES.values():
        for name in needs_inputs(build_loss(case.name, **case.hyperparameters)):
            assert f'["{name}"]' in text, name


def read_at():
    """Rows of the table of sources by the names in their first cell: where, and with what result."""
    found = {}
    for line in PAGE.read_text().split("## Where each was read")[1].split("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4:
            found.update({name: cells for name in re.findall(r"`(\w+)`", cells[0])})
    return found


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_where_each_was_read(name):
    """The page, the docstring and the folder of the code agree on what is verified."""
    _, where, result, _ = read_at()[name]
    unverified = "not verified" in result
    assert where and (unverified or re.search("agree|differs", result))
    assert unverified == bool(re.search("reconstructed|inferred", rows()[name][7]))
    assert unverified == LOSSES[name].__module__.startswith("spo_kernels.losses.reconstructed.")


def test_what_is_not_verified_is_on_its_page():
    text = UNVERIFIED.read_text()
    sections = text.split("\n## ")[2:]
    assert len(sections) == 6
    for section in sections:
        assert re.search(r"arXiv \d{4}\.\d{5}", section) and "**Would settle it**" in section
    for name, (*_, result, _) in read_at().items():
        assert ("not verified" in result) == (f"`{name}`" in text)
