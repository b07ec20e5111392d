"""CONTRIBUTING's worked example, taken from the page and put through the tests that its row would bring."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import pytest
import torch

import spo_kernels
from spo_kernels.losses import LOSSES, SFT, SPO, WeightedSum, named_loss, registry

from . import cases, closed_forms, test_closed_forms, test_coupling, test_through_logits

ROOT = Path(spo_kernels.__file__).parents[1]


@pytest.fixture
def example(monkeypatch):
    """The page's class, registered as it says, and its row."""
    if not (ROOT / "CONTRIBUTING.md").exists():
        pytest.skip("an installed package has no CONTRIBUTING.md")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code, row = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {"__name__": "spo_kernels.losses.example"}
    exec(code, scope)
    name, loss = re.search(r'"(\w+)": (\w+),` in `registry.py`', text).groups()
    monkeypatch.setitem(LOSSES, name, scope[loss])
    monkeypatch.setitem(registry._DEFAULTS, name, scope[loss]())
    monkeypatch.setattr(cases, "CASES", {})
    helpers = {key: getattr(closed_forms, key) for key in ("Points", "Array", "np", "sig", "logsig")}
    exec(row, {**helpers, "partial": partial, "case": cases.case})
    ((label, case),) = cases.CASES.items()
    assert label == name
    return scope[loss], case


def test_the_example_passes_the_tests_of_its_row(example, monkeypatch):
    loss, case = example
    assert dataclasses.is_dataclass(loss) and named_loss(case.name) == loss()
    test_closed_forms.test_random_points(case)
    test_closed_forms.test_margins_of_500(case)
    test_closed_forms.test_nothing_overflows(case, 1e4, torch.float32)
    monkeypatch.setattr(test_coupling, "CASES", {case.name: case})
    test_coupling.test_declared_coupling_is_what_is_seen(case.name)
    for packed in (False, True):
        test_through_logits.test_float64(case, packed)


def test_the_example_composes(example):
    loss, _ = example
    pairs = test_closed_forms.as_pairs(test_closed_forms.random_points(8))
    base = loss()(pairs)
    nll = SFT("mean")(pairs)
    torch.testing.assert_close(SPO(loss())(pairs), base + nll)
    torch.testing.assert_close(WeightedSum((loss(), SFT("mean")), (1.0, 0.1))(pairs), base + 0.1 * nll)


def test_mistakes_are_noticed(example, monkeypatch):
    """A wrong derivative, and a coupling that is declared too narrow."""
    loss, case = example
    with pytest.raises(AssertionError):
        test_closed_forms.test_random_points(dataclasses.replace(case, formula=closed_forms.dpo))
    monkeypatch.setattr(loss, "coupling", "margin")
    monkeypatch.setattr(test_coupling, "CASES", {case.name: case})
    with pytest.raises(AssertionError):
        test_coupling.test_declared_coupling_is_what_is_seen(case.name)
