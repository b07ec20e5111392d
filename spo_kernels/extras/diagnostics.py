"""What preference training does to the likelihood of its pairs: pure functions of sequence log-probabilities.

All take `PairLogps` with reference log-probabilities: the reference's or, to see displacement since the start of a
run, the starting model's. With `r_w = log πθ(y_w|x) - log πref(y_w|x)` and `r_l` alike.
"""

import math

import torch
from torch import Tensor

from spo_kernels.losses.pairs import PairLogps

QUANTILES = (0.1, 0.5, 0.9)


def gradient_log_ratio(pairs: PairLogps) -> Tensor:
    """`log(|∂L/∂x_w| / |∂L/∂x_l|) = r_l - r_w`, `[B]` nats, for DPO's loss L and probability ratios `x = exp(r)`.

    Negative once the policy prefers the chosen response: the push away from the rejected one then outweighs the pull
    to the chosen one. In log-probabilities both gradients are β σ(-βΔ), whatever Δ is.

    Source: 3D-Properties (arXiv 2406.07327), corollary 1; Feng et al. (arXiv 2404.04626) state the same result,
    re-derived here, not read.
    """
    ref_chosen, ref_rejected = pairs.reference("gradient_log_ratio")
    return (pairs.rejected - ref_rejected) - (pairs.chosen - ref_chosen)


def displacement(pairs: PairLogps) -> Tensor:
    """`max(0, -r_w)`, `[B]` nats: by how much the chosen response's log-probability fell; 0 where it rose."""
    ref_chosen, _ = pairs.reference("displacement")
    return (ref_chosen - pairs.chosen).clamp_min(0.0)


def lost_mass(pairs: PairLogps) -> Tensor:
    """`log(πref(y_w) + πref(y_l)) - log(πθ(y_w) + πθ(y_l))`, `[B]` nats; positive where probability left both
    responses for others.
    """
    ref_chosen, ref_rejected = pairs.reference("lost_mass")
    return torch.logaddexp(ref_chosen, ref_rejected) - torch.logaddexp(pairs.chosen, pairs.rejected)


def length_bucket(length: int) -> str:
    """`"17-32"` for lengths above 16 up to 32 tokens, and so on in powers of two; `"1"` up to 1."""
    upper = 1 << max(0, length - 1).bit_length()
    return "1" if upper == 1 else f"{upper // 2 + 1}-{upper}" if upper > 2 else "2"


def summarize(pairs: PairLogps, tolerance: float = 1e-3) -> dict[str, float]:
    """All of the above for B pairs, as flat names and numbers; empty for no pairs. Computed in float64.

    Args:
        pairs: With a reference.
        tolerance: Nats by which a log-probability must have moved to count as fallen: above rounding, far below any
            effect.

    Returns:
        `gradient_log_ratio/mean`, `/p10`, `/p50`, `/p90`;
        `margin_rose/share` of pairs that the policy tells apart better than the reference does, `r_w > r_l`: DPO's
        reward accuracy, for every objective;
        `chosen_fell/share` of pairs and `chosen_fell/nats`, the mean displacement over all pairs;
        `both_fell/share` of pairs; `lost_mass/nats`, mean;
        for each power-of-two bucket of the chosen response's tokens that occurs, `chosen_change/17-32`: mean r_w, and
        `pairs/17-32`: how many.

    Raises:
        ValueError: `pairs` has no reference.
    """
    ref_chosen, ref_rejected = pairs.reference("summarize")
    if not len(pairs.chosen):
        return {}
    pairs = PairLogps(
        chosen=pairs.chosen.detach().double(),
        rejected=pairs.rejected.detach().double(),
        ref_chosen=ref_chosen.double(),
        ref_rejected=ref_rejected.double(),
        chosen_lengths=pairs.chosen_lengths,
        rejected_lengths=pairs.rejected_lengths,
    )
    change = pairs.chosen - ref_chosen
    fell = change < -tolerance
    ratio = gradient_log_ratio(pairs)
    numbers = {
        "gradient_log_ratio/mean": ratio.mean(),
        **{f"gradient_log_ratio/p{round(100 * q)}": _quantile(ratio, q) for q in QUANTILES},
        "margin_rose/share": (ratio < -tolerance).double().mean(),
        "chosen_fell/share": fell.double().mean(),
        "chosen_fell/nats": displacement(pairs).mean(),
        "both_fell/share": (fell & (pairs.rejected - ref_rejected < -tolerance)).double().mean(),
        "lost_mass/nats": lost_mass(pairs).mean(),
    }
    buckets: dict[str, list[int]] = {}
    for index, length in sorted(enumerate(pairs.chosen_lengths.tolist()), key=lambda item: item[1]):
        buckets.setdefault(length_bucket(length), []).append(index)
    for bucket, members in buckets.items():
        numbers[f"chosen_change/{bucket}"] = change[members].mean()
        numbers[f"pairs/{bucket}"] = torch.tensor(float(len(members)))
    return {name: value.item() for name, value in numbers.items()}


def _quantile(values: Tensor, share: float) -> Tensor:
    """Linear interpolation, like `torch.quantile`, which stops at 16 M values."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
