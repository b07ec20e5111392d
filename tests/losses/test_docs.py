"""docs/objectives.md has a row for every registered name, with its hyperparameters, defaults and coupling."""

import dataclasses
import re
from pathlib import Path

import pytest

import spo_kernels
from spo_kernels.losses import LOSSES, build_loss, needs_inputs

from .cases import CASES

PAGE = Path(spo_kernels.__file__).parents[1] / "docs" / "objectives.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="an installed package has no docs")


def rows():
    """Table rows by the names in their first cell."""
    found = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 8:
            found.update({name: cells for name in re.findall(r"`(\w+)`", cells[0])})
    return found


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_row_for_every_name(name):
    assert name in rows(), f"{name} has no row in docs/objectives.md"
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


def test_every_input_is_named():
    text = PAGE.read_text()
    for case in CASES.values():
        for name in needs_inputs(build_loss(case.name, **case.hyperparameters)):
            assert f'["{name}"]' in text, name


@pytest.mark.parametrize("name", ["spo", "bdpo", "h_dpo", "uncertainty_dpo", "ada_dpo", "balanced_dpo"])
def test_reconstructions_are_marked(name):
    assert re.search("reconstructed|inferred", rows()[name][7])
