"""Diagnostics against their definitions, in plain Python."""

import math

import pytest
import torch

from spo_kernels.extras.diagnostics import displacement, gradient_log_ratio, length_bucket, lost_mass, summarize
from spo_kernels.losses import DPO, PairLogps


def make_pairs(count: int, seed: int = 0, scale: float = 20.0) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    ref = -scale * torch.rand(2, count, dtype=torch.float64, generator=generator)
    logps = ref + torch.randn(2, count, dtype=torch.float64, generator=generator)
    lengths = torch.randint(1, 70, (2, count), generator=generator)
    return PairLogps(*logps, *ref, *lengths)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_gradient_ratio_is_that_of_dpo(beta: float) -> None:
    """Autograd through DPO as a function of probability ratios x."""
    pairs = make_pairs(200, scale=3.0)
    x = [
        (p - q).exp().requires_grad_()
        for p, q in ((pairs.chosen, pairs.ref_chosen), (pairs.rejected, pairs.ref_rejected))
    ]
    zero = torch.zeros_like(pairs.chosen)
    ones = torch.ones_like(pairs.chosen_lengths)
    loss = DPO(beta)(PairLogps(x[0].log(), x[1].log(), zero, zero, ones, ones)).sum()
    chosen, rejected = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient_log_ratio(pairs), (chosen.abs() / rejected.abs()).log(), rtol=1e-9, atol=1e-9)


def test_pair_quantities() -> None:
    pairs = make_pairs(200, scale=3.0)
    for i in range(200):
        p_w, p_l, q_w, q_l = (t[i].item() for t in (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected))
        assert displacement(pairs)[i].item() == pytest.approx(max(0.0, q_w - p_w))
        mass = math.log(math.exp(q_w) + math.exp(q_l)) - math.log(math.exp(p_w) + math.exp(p_l))
        assert lost_mass(pairs)[i].item() == pytest.approx(mass, abs=1e-12)


def test_lost_mass_of_long_responses() -> None:
    """Probabilities far below the smallest float."""
    one = torch.ones(1, dtype=torch.int64)
    pairs = PairLogps(*(torch.tensor([v], dtype=torch.float64) for v in (-3002.0, -4000.0, -3000.0, -3000.0)), one, one)
    assert lost_mass(pairs).item() == pytest.approx(2 + math.log(2))


@pytest.mark.parametrize("count", [1, 2, 57])
def test_summary(count: int) -> None:
    pairs = make_pairs(count, seed=count)
    found = summarize(pairs)
    change = (pairs.chosen - pairs.ref_chosen).tolist()
    other = (pairs.rejected - pairs.ref_rejected).tolist()
    ratio = torch.tensor([b - a for a, b in zip(change, other, strict=True)], dtype=torch.float64)
    expected = {
        "gradient_log_ratio/mean": ratio.mean().item(),
        **{f"gradient_log_ratio/p{round(100 * q)}": ratio.quantile(q).item() for q in (0.1, 0.5, 0.9)},
        "margin_rose/share": sum(r < -1e-3 for r in ratio.tolist()) / count,
        "chosen_fell/share": sum(c < 0 for c in change) / count,
        "chosen_fell/nats": sum(max(0.0, -c) for c in change) / count,
        "both_fell/share": sum(a < 0 and b < 0 for a, b in zip(change, other, strict=True)) / count,
        "lost_mass/nats": lost_mass(pairs).mean().item(),
    }
    buckets: dict[str, list[float]] = {}
    for length, value in zip(pairs.chosen_lengths.tolist(), change, strict=True):
        name = next(
            b for b in ("1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65-128") if length <= int(b.split("-")[-1])
        )
        buckets.setdefault(name, []).append(value)
    for name, values in buckets.items():
        expected |= {f"chosen_change/{name}": sum(values) / len(values), f"pairs/{name}": len(values)}
    assert found == pytest.approx(expected)


def test_rounding_is_no_displacement() -> None:
    """Before training, policy and reference differ by rounding only."""
    pairs = make_pairs(50)
    ref_chosen, ref_rejected = pairs.reference("test")
    pairs = PairLogps(ref_chosen - 1e-5, ref_rejected - 1e-5, ref_chosen, ref_rejected, *[pairs.chosen_lengths] * 2)
    assert summarize(pairs)["chosen_fell/share"] == summarize(pairs)["both_fell/share"] == 0.0
    assert summarize(pairs, tolerance=1e-6)["chosen_fell/share"] == 1.0
    assert summarize(pairs)["margin_rose/share"] == 0.0


def test_no_pairs_and_no_reference() -> None:
    assert summarize(make_pairs(0)) == {}
    one, length = torch.ones(1), torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="summarize needs a reference"):
        summarize(PairLogps(one, one, None, None, length, length))


@pytest.mark.parametrize(
    ("length", "name"), [(0, "1"), (1, "1"), (2, "2"), (3, "3-4"), (4, "3-4"), (5, "5-8"), (32, "17-32"), (33, "33-64")]
)
def test_length_buckets(length: int, name: str) -> None:
    assert length_bucket(length) == name
