"""Points at which objectives are compared, and an objective's losses and coefficients there."""

import numpy as np
import torch

from spo_kernels.losses import PairLogps

from .closed_forms import Points

INPUTS = {
    "offset": (0.0, 3.0),
    "uncertainty": (0.0, 2.0),
    "chosen_uncertainty": (0.0, 2.0),
    "rejected_uncertainty": (0.0, 2.0),
    "chosen_coefficient": (0.2, 2.0),
    "rejected_coefficient": (0.2, 2.0),
    "chosen_probability": (0.5, 1.0),
    "rejected_probability": (0.0, 0.5),
    "kl": (-1.0, 4.0),
    "mismatched_ratio": (-1.0, 4.0),
    "chosen_pilot": (-8.0, 8.0),
    "rejected_pilot": (-8.0, 8.0),
    "spo_value": (0.5, 3.0),
}
# sums over tokens, which fused_spo_loss finds where an objective asks for them
TOKEN_INPUTS = {
    f"{side}_{name}": bounds
    for name, bounds in {"kl": (0.0, 30.0), "logp": (-60.0, 0.0), "log_sum_p2": (-60.0, 0.0)}.items()
    for side in ("chosen", "rejected")
}


def random_points(count=256, seed=0):
    """Responses of 1 to 60 tokens at 0.1 to 4 nats a token; log-ratios from a hundredth of a nat to tens."""
    draw = np.random.default_rng(seed)
    n_w, n_l = draw.integers(1, 61, (2, count))
    scale = 10.0 ** draw.uniform(-2, 1.5, count)
    q_w, q_l = -n_w * draw.uniform(0.1, 4.0, count), -n_l * draw.uniform(0.1, 4.0, count)
    p_w, p_l = (np.minimum(q + scale * draw.normal(size=count), -1e-3) for q in (q_w, q_l))
    inputs = {name: draw.uniform(*bounds, count) for name, bounds in (INPUTS | TOKEN_INPUTS).items()}
    return Points(p_w, p_l, q_w, q_l, n_w, n_l, inputs)


def extreme_points(size):
    """Margins of ±size from either response or both, lengths of 1, and empty responses."""
    rows = [
        # p_w, p_l, q_w, q_l, n_w, n_l
        (-1.0, -size, -2.0, -1.5, 1, 1),
        (-size, -1.0, -2.0, -1.75, 1, 1),
        (-2.0, -1.0, -size, -1.5, 1, 7),
        (-2.0, -1.5, -3.25, -size, 7, 1),
        (-size, -2.0 - size, -2.0 * size, -size, 100, 100),
        (-1e-9, -2e-9, -0.5 * size, -0.4 * size, 1, 1),
        (-1e-9, -size, -1.5 * size, -1e-9, 1, 1),
        (0.0, -size, 0.0, -0.7 * size, 0, 3),
        (-size, 0.0, -0.6 * size, 0.0, 3, 0),
        (-3.0, -2.25, -2.0, -1.0, 1, 1),
    ]
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    inputs = {name: np.linspace(*bounds, len(rows)) for name, bounds in (INPUTS | TOKEN_INPUTS).items()}
    return Points(*columns, inputs)


def as_pairs(points, dtype=torch.float64):
    """The points as an objective sees them; log-probabilities of the policy require gradients."""
    values = {
        name: torch.tensor(getattr(points, key), dtype=dtype)
        for name, key in (("chosen", "p_w"), ("rejected", "p_l"), ("ref_chosen", "q_w"), ("ref_rejected", "q_l"))
    }
    lengths = {"chosen_lengths": torch.tensor(points.n_w), "rejected_lengths": torch.tensor(points.n_l)}
    inputs = {name: torch.tensor(value, dtype=dtype) for name, value in points.inputs.items()}
    for name in ("chosen", "rejected"):
        values[name].requires_grad_()
    return PairLogps(**values, **lengths, inputs=inputs)


def differentiate(objective, pairs):
    """Losses, and the derivatives of their sum by the policy's log-probabilities; 0 where there is none."""
    losses = objective(pairs)
    found = torch.autograd.grad(losses.sum(), (pairs.chosen, pairs.rejected), allow_unused=True)
    slopes = [torch.zeros_like(pairs.chosen) if slope is None else slope for slope in found]
    return losses.detach(), *slopes
