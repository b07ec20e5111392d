"""The declared `coupling` selects the gradient's path: it is exactly what coefficients depend on."""

import dataclasses

import pytest
import torch

from spo_kernels.losses import DPO, IPO, SPO, FDivergence, WeightedSum, build_loss
from spo_kernels.losses.pairs import coupling_of

from .cases import CASES
from .points import as_pairs, differentiate, random_points

PAIRS = 4


def coefficients(name, hyperparameters, pairs):
    """Of a fresh objective, so that running statistics start where they did."""
    _, chosen, rejected = differentiate(build_loss(name, **hyperparameters), pairs)
    return torch.stack([chosen, rejected])


def moved(pairs, side, pair, amount):
    """The pairs with one log-probability changed."""
    logps = getattr(pairs, side).detach().clone()
    logps[pair] = (logps[pair] + amount).clamp_max(-1e-3)
    return dataclasses.replace(pairs, **{side: logps.requires_grad_()})


def half(pairs):
    """Every second pair, as a path that takes pairs in groups sees them."""
    values = {f.name: getattr(pairs, f.name) for f in dataclasses.fields(pairs)}
    parts = {key: value[::2] for key, value in values.items() if isinstance(value, torch.Tensor)}
    parts["inputs"] = {key: value[::2] for key, value in pairs.inputs.items()}
    for side in ("chosen", "rejected"):
        parts[side] = parts[side].detach().requires_grad_()
    return dataclasses.replace(pairs, **parts)


def observed_coupling(name, hyperparameters):
    """The narrowest that explains which coefficients move with one log-probability, or when pairs are left out."""
    across = within = False
    opposite = True
    for seed in range(3):
        pairs = as_pairs(random_points(PAIRS, seed))
        before = coefficients(name, hyperparameters, pairs)
        opposite &= torch.allclose(before[0], -before[1], rtol=1e-9, atol=1e-14)
        across |= not torch.allclose(
            coefficients(name, hyperparameters, half(pairs)), before[:, ::2], rtol=1e-9, atol=0
        )
        for number, side in enumerate(("chosen", "rejected")):
            for pair in range(PAIRS):
                for amount in (-25.0, -0.5, 0.4, 25.0):
                    after = coefficients(name, hyperparameters, moved(pairs, side, pair, amount))
                    opposite &= torch.allclose(after[0], -after[1], rtol=1e-9, atol=1e-14)
                    changed = (after != before).any(0)
                    changed[pair] = False
                    across |= bool(changed.any())
                    within |= bool(after[1 - number, pair] != before[1 - number, pair])
        if across:
            return "batch"
    if opposite:
        return "margin"
    return "pair" if within else "sequence"


# at these hyperparameters alone the objective is DPO; the last one has to see whole batches to count them
NARROWER = {"bdpo-is-dpo": "margin", "f_divergence-alpha-1": "margin", "dpo_shift_linear": "pair"}


@pytest.mark.parametrize("row", CASES)
def test_declared_coupling_is_what_is_seen(row):
    case = CASES[row]
    declared = coupling_of(build_loss(case.name, **case.hyperparameters))
    assert observed_coupling(case.name, case.hyperparameters) == NARROWER.get(row, declared)


def test_wrappers_and_sums():
    assert SPO(DPO()).coupling == "pair"
    assert SPO(build_loss("apo_zero")).coupling == "sequence"
    assert SPO(build_loss("aot")).coupling == "batch"
    assert SPO(lambda pairs: pairs.chosen).coupling == "batch"
    assert FDivergence(DPO()).coupling == FDivergence(IPO()).coupling == "pair"
    assert FDivergence(DPO(), "reverse_kl").coupling == "margin"
    assert WeightedSum((DPO(), build_loss("hinge")), (1, 1)).coupling == "margin"
    assert WeightedSum((DPO(), build_loss("apo_zero")), (1, 1)).coupling == "pair"
    assert WeightedSum((DPO(), build_loss("sft")), (1, 1)).coupling == "batch"
