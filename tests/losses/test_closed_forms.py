"""Each objective's loss and coefficients against its formula and derivatives by hand, in float64."""

import dataclasses

import numpy as np
import pytest
import torch

from spo_kernels.losses import LOSSES, build_loss

from .cases import CASES
from .points import as_pairs, differentiate, extreme_points, random_points

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
NAMES = ("loss", "g_w", "g_l")


def check(case, points, dtype, rtol, atol):
    """Element by element; `atol` is for coefficients where a sigmoid has saturated."""
    objective = build_loss(case.name, **case.hyperparameters)
    with np.errstate(over="ignore"):
        wanted = case.formula(points)
    found = differentiate(objective, as_pairs(points, dtype))
    for name, value, truth in zip(NAMES, found, wanted, strict=True):
        value = value.double().numpy()
        assert value.shape == truth.shape, name
        assert np.isfinite(value).all(), (name, value)
        np.testing.assert_allclose(value, truth, rtol=rtol, atol=atol, err_msg=name)


def test_every_objective_has_a_row():
    assert {case.name for case in CASES.values()} == set(LOSSES)


@each_case
def test_random_points(case):
    points = random_points()
    assert len(points.p_w) >= 200
    check(case, points, torch.float64, 1e-10, 1e-14)


@each_case
def test_margins_of_500(case):
    check(case, extreme_points(500.0), torch.float64, 1e-10, 1e-14)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [500.0, 1e4])
def test_nothing_overflows(case, size, dtype):
    points = extreme_points(size)
    objective = build_loss(case.name, **case.hyperparameters)
    for value in differentiate(objective, as_pairs(points, dtype)):
        assert value.isfinite().all()


@each_case
def test_float32(case):
    """Same values from float32 sums, to the rounding of their exponents: a logit of a few hundred has 3e-5."""
    points = random_points()
    for name in ("p_w", "p_l", "q_w", "q_l"):
        setattr(points, name, getattr(points, name).astype(np.float32).astype(np.float64))
    points.__post_init__()
    check(case, points, torch.float32, 1e-4, 1e-6)


@each_case
def test_stays_on_its_device(case):
    """On the meta device, where a value read on the host or a tensor made elsewhere is an error."""
    pairs = as_pairs(random_points(8), torch.float32)

    def moved(value):
        leaf = value.detach().to("meta")
        return leaf.requires_grad_() if value.requires_grad else leaf

    values = {f.name: getattr(pairs, f.name) for f in dataclasses.fields(pairs) if f.name != "inputs"}
    pairs = dataclasses.replace(
        pairs,
        inputs={name: moved(value) for name, value in pairs.inputs.items()},
        **{name: moved(value) for name, value in values.items()},
    )
    for value in differentiate(build_loss(case.name, **case.hyperparameters), pairs):
        assert value.device.type == "meta" and value.shape == (8,) and value.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_empty_batch(name):
    points = random_points(0)
    for value in differentiate(build_loss(name), as_pairs(points)):
        assert value.shape == (0,)


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        *(("alphapo", {"alpha": alpha}) for alpha in (1e-3, -1e-4, 1e-5, 1e-6)),
        *(("f_divergence", {"divergence": "alpha_divergence", "coefficient": 1.0 + c}) for c in (1e-3, 1e-5)),
    ],
    ids=str,
)
def test_small_exponents_in_float32(name, hyperparameters):
    """exp(x) - 1 of a small x has few digits left where it is written so."""
    objective, points = build_loss(name, **hyperparameters), random_points()
    wanted = differentiate(objective, as_pairs(points, torch.float64))
    found = differentiate(objective, as_pairs(points, torch.float32))
    for value, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=2e-5, atol=1e-6)
