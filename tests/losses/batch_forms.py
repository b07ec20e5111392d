"""Objectives that couple the pairs of a batch, by hand: formulas as in `closed_forms`, of the first batch where there
are running statistics.
"""

import math

import numpy as np
from numpy import exp, log

from .closed_forms import Array, Points, bco, both, dpo, kto, logsig, sig


def alpha_dpo(x: Points, b: float, g: float, a: float) -> tuple[Array, Array, Array]:
    m = b * x.delta
    z = b * (x.p_w / x.m_w - x.p_l / x.m_l) - g - a * (m - m.mean()) / m.std(ddof=1)
    return -logsig(z), -b * sig(-z) / x.m_w, b * sig(-z) / x.m_l


def alpha_dpo_code(x: Points, b: float, g: float, a: float, e: float = 0.0) -> tuple[Array, Array, Array]:
    """The first batch: both statistics are a tenth of the batch's."""
    gap = x.r_w / x.m_w - x.r_l / x.m_l
    scores = (gap - 0.1 * gap.mean()) / (0.1 * gap.std(ddof=1))
    z = b * (x.p_w / x.m_w - x.p_l / x.m_l - g - a * scores)
    slope = -b * ((1 - e) * sig(-z) - e * sig(z))
    return -(1 - e) * logsig(z) - e * logsig(-z), slope / x.m_w, -slope / x.m_l


def kto_mean(x: Points, b: float, d: float, u: float, ratios: str = "matched") -> tuple[Array, Array, Array]:
    seen = np.concatenate([x.r_w, x.r_l]) if ratios == "matched" else x.inputs["mismatched_ratio"]
    return kto(x, b, d, u, max(0.0, seen.mean()))


def bco_first(x: Points, b: float) -> tuple[Array, Array, Array]:
    """δ is the batch's mean reward."""
    return bco(x, b, b * np.concatenate([x.r_w, x.r_l]).mean())


def aot(x: Points, b: float, e: float = 0.0) -> tuple[Array, Array, Array]:
    policy = x.p_w - x.p_l
    order = np.argsort(policy)
    z = b * (policy[order] - np.sort(x.q_w - x.q_l))
    slope = np.empty_like(z)
    slope[order] = -b * ((1 - e) * sig(-z) - e * sig(z))
    return -(1 - e) * logsig(z) - e * logsig(-z), slope, -slope


def aot_unpaired(x: Points, b: float, e: float = 0.0) -> tuple[Array, Array, Array]:
    first, second = np.argsort(x.r_w), np.argsort(x.r_l)
    z = b * (x.r_w[first] - x.r_l[second])
    slope = -b * ((1 - e) * sig(-z) - e * sig(z))
    g_w, g_l = np.empty_like(z), np.empty_like(z)
    g_w[first], g_l[second] = slope, -slope
    return -(1 - e) * logsig(z) - e * logsig(-z), g_w, g_l


def splitmix64(state: int, count: int) -> list[int]:
    """The generator as published, in unbounded integers."""
    found, mask = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def uniform_numbers(count: int, seed: int, step: int) -> Array:
    """The stream whose start is the generator's output number `step` from `seed`."""
    start = splitmix64(seed, step + 1)[-1]
    return np.array([((bits >> 12) + 0.5) / 2**52 for bits in splitmix64(start, count)])


def beta_kept(delta: Array, mean: float, std: float, share: float, seed: int, step: int) -> Array:
    """Which pairs β-DPO keeps: those with the largest of log-weight plus Gumbel noise."""
    noise = -log(-log(uniform_numbers(len(delta), seed, step)))
    keys = -0.5 * ((delta - mean) / std) ** 2 + noise
    return np.argsort(-keys)[: max(1, math.floor(share * len(delta)))]


def beta_dpo(
    x: Points, b: float = 0.1, a: float = 0.6, share: float = 0.8, decay: float = 0.9, seed: int = 0
) -> tuple[Array, Array, Array]:
    """The moving averages are (1 - decay) of the batch's moments."""
    mean, std = (1 - decay) * x.delta.mean(), (1 - decay) * x.delta.std(ddof=1)
    kept = beta_kept(x.delta, mean, std, share, seed, 0)
    beta = max(1e-3, b * (1 + a * (x.delta[kept].mean() - mean)))
    weight = np.zeros(len(x.delta))
    weight[kept] = len(x.delta) / len(kept)
    return both(-weight * logsig(beta * x.delta), -weight * beta * sig(-beta * x.delta))


def dr_dpo(x: Points, b: float, prime: float) -> tuple[Array, Array, Array]:
    losses, g_w, _ = dpo(x, b)
    size = len(losses)
    scaled_losses = -losses / prime
    top = scaled_losses.max()
    total = exp(scaled_losses - top).sum()
    weights = exp(scaled_losses - top) / total
    value = -prime * (top + log(total) - log(size))
    return both(np.full(size, value), size * weights * g_w)
