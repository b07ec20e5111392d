"""Every objective once more: loss and derivatives by hand, in numpy and float64; nothing here is autograd's.

A formula maps `Points` to (losses, g_w, g_l), where g is the derivative of the losses' sum by the policy's
log-probability. Each case is a registered name, hyperparameters, and the formula.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy import exp, log, where

Array = np.ndarray


@dataclass
class Points:
    """p and q: log-probabilities of the two responses under policy and reference; n: their tokens."""

    p_w: Array
    p_l: Array
    q_w: Array
    q_l: Array
    n_w: Array
    n_l: Array
    inputs: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.r_w, self.r_l = self.p_w - self.q_w, self.p_l - self.q_l
        self.delta = self.r_w - self.r_l
        self.m_w, self.m_l = np.maximum(self.n_w, 1), np.maximum(self.n_l, 1)


@dataclass
class Case:
    """A registered name, its hyperparameters, and its formula."""

    name: str
    hyperparameters: dict[str, object]
    formula: Callable[[Points], tuple[Array, Array, Array]]


def logsig(x: Array) -> Array:
    """log σ(x)."""
    return -np.logaddexp(0.0, -x)


def sig(x: Array) -> Array:
    """σ(x), with all digits of small values."""
    return exp(logsig(x))


def both(loss: Array, slope: Array) -> tuple[Array, Array, Array]:
    """A loss of the margin, whose slope is dL/dΔ."""
    return loss, slope, -slope


def dpo(x: Points, b: float = 0.1) -> tuple[Array, Array, Array]:
    return both(-logsig(b * x.delta), -b * sig(-b * x.delta))


def cdpo(x: Points, b: float, e: float) -> tuple[Array, Array, Array]:
    z = b * x.delta
    return both(-(1 - e) * logsig(z) - e * logsig(-z), -b * ((1 - e) * sig(-z) - e * sig(z)))


def robust(x: Points, b: float, e: float) -> tuple[Array, Array, Array]:
    z = b * x.delta
    slope = -b * ((1 - e) * sig(-z) + e * sig(z)) / (1 - 2 * e)
    return both((-(1 - e) * logsig(z) + e * logsig(-z)) / (1 - 2 * e), slope)


def exo(x: Points, b: float, e: float) -> tuple[Array, Array, Array]:
    z = b * x.delta
    q, r = sig(z), sig(-z)
    loss = q * (logsig(z) - log(1 - e)) + r * (logsig(-z) - log(e))
    return both(loss, b * q * r * (z - log((1 - e) / e)))


def hinge(x: Points, b: float, free: bool = False) -> tuple[Array, Array, Array]:
    gap = 1 - b * ((x.p_w - x.p_l) if free else x.delta)
    return both(np.maximum(gap, 0), where(gap > 0, -b, 0.0))


def slic(x: Points, d: float, w: float) -> tuple[Array, Array, Array]:
    gap = d - x.p_w + x.p_l
    return np.maximum(gap, 0) - w * x.p_w, -1.0 * (gap > 0) - w, 1.0 * (gap > 0)


def ipo(x: Points, b: float) -> tuple[Array, Array, Array]:
    d = x.r_w / x.m_w - x.r_l / x.m_l - 1 / (2 * b)
    return d**2, 2 * d / x.m_w, -2 * d / x.m_l


def ipo_sum(x: Points, b: float) -> tuple[Array, Array, Array]:
    d = x.delta - 1 / (2 * b)
    return both(d**2, 2 * d)


def sft_tokens(x: Points) -> tuple[Array, Array, Array]:
    total, size = x.n_w.sum(), len(x.p_w)
    return np.full(size, -x.p_w.sum() / total), np.full(size, -size / total), np.zeros(size)


def sft_mean(x: Points) -> tuple[Array, Array, Array]:
    return -x.p_w / x.m_w, -1 / x.m_w, 0 * x.p_w


def sft_sum(x: Points) -> tuple[Array, Array, Array]:
    return -x.p_w, -1 + 0 * x.p_w, 0 * x.p_w


def weighted(*terms: tuple[float, Callable]) -> Callable[[Points], tuple[Array, ...]]:
    """Σ weight * formula."""

    def total(x: Points) -> tuple[Array, ...]:
        found = [(weight, formula(x)) for weight, formula in terms]
        return tuple(sum(weight * parts[i] for weight, parts in found) for i in range(3))

    return total


def cpo_hinge(x: Points, b: float) -> tuple[Array, Array, Array]:
    return hinge(x, b, free=True)


def cpo_ipo(x: Points, b: float) -> tuple[Array, Array, Array]:
    d = x.p_w / x.m_w - x.p_l / x.m_l - 1 / (2 * b)
    return d**2, 2 * d / x.m_w, -2 * d / x.m_l


def cpo_sigmoid(x: Points, b: float, e: float = 0.0) -> tuple[Array, Array, Array]:
    z = b * (x.p_w - x.p_l)
    return both(-(1 - e) * logsig(z) - e * logsig(-z), -b * ((1 - e) * sig(-z) - e * sig(z)))


def orpo(x: Points, b: float) -> tuple[Array, Array, Array]:
    a_w, a_l = x.p_w / x.m_w, x.p_l / x.m_l
    c_w, c_l = np.minimum(a_w, -1e-6), np.minimum(a_l, -1e-6)
    odds = c_w - log(-np.expm1(c_w)) - c_l + log(-np.expm1(c_l))
    slope_w = where(a_w <= -1e-6, -b * sig(-odds) / -np.expm1(c_w), 0.0)
    slope_l = where(a_l <= -1e-6, b * sig(-odds) / -np.expm1(c_l), 0.0)
    return -a_w - b * logsig(odds), (slope_w - 1) / x.m_w, slope_l / x.m_l


def sigmoid_norm(x: Points, b: float) -> tuple[Array, Array, Array]:
    z = b * (x.r_w / x.m_w - x.r_l / x.m_l)
    return -logsig(z), -b * sig(-z) / x.m_w, b * sig(-z) / x.m_l


def simpo(x: Points, b: float, g: float, e: float = 0.0) -> tuple[Array, Array, Array]:
    z = b * (x.p_w / x.m_w - x.p_l / x.m_l) - g
    slope = -b * ((1 - e) * sig(-z) - e * sig(z))
    return -(1 - e) * logsig(z) - e * logsig(-z), slope / x.m_w, -slope / x.m_l


def alphapo(x: Points, b: float, g: float, a: float) -> tuple[Array, Array, Array]:
    t_w, t_l = -a * x.p_w / x.m_w, -a * x.p_l / x.m_l
    powers_w, powers_l = exp(np.minimum(t_w, 80)), exp(np.minimum(t_l, 80))
    z = b * (powers_l - powers_w) / a - g
    s = sig(-z)
    return -logsig(z), -b * s * powers_w * (t_w <= 80) / x.m_w, b * s * powers_l * (t_l <= 80) / x.m_l


def flex(x: Points, b_w: float, b_l: float, e: float = 0.0) -> tuple[Array, Array, Array]:
    z = b_w * x.r_w - b_l * x.r_l
    slope = (1 - e) * sig(-z) - e * sig(z)
    return -(1 - e) * logsig(z) - e * logsig(-z), -b_w * slope, b_l * slope


def bdpo(x: Points, b: float, lam: float) -> tuple[Array, Array, Array]:
    shift = log(lam) - log(1 - lam)
    z = b * (x.r_w - np.logaddexp(log(lam) + x.r_l, log(1 - lam)))
    return -logsig(z), -b * sig(-z), b * sig(-z) * sig(x.r_l + shift)


def bpo(x: Points, b: float, a: float, hinged: bool = False) -> tuple[Array, Array, Array]:
    first = x.r_w < -a * x.r_l
    z = b * np.minimum(x.r_w, -a * x.r_l)
    slope = 1.0 * (z < 1) if hinged else sig(-z)
    loss = np.maximum(1 - z, 0) if hinged else -logsig(z)
    return loss, where(first, -b * slope, 0.0), where(first, 0.0, a * b * slope)


def dpop(x: Points, b: float, lam: float) -> tuple[Array, Array, Array]:
    z = b * (x.delta - lam * np.maximum(0, -x.r_w))
    return -logsig(z), -b * sig(-z) * (1 + lam * (x.r_w <= 0)), b * sig(-z)


def tdpo(x: Points, b: float, a: float) -> tuple[Array, Array, Array]:
    z = b * (x.delta - a * (x.inputs["rejected_kl"] - x.inputs["chosen_kl"]))
    return both(-logsig(z), -b * sig(-z))


def wpo(x: Points, clamp: bool = True) -> tuple[Array, Array, Array]:
    mean_w = (x.inputs["chosen_logp"] - x.inputs["chosen_log_sum_p2"]) / x.m_w
    mean_l = (x.inputs["rejected_logp"] - x.inputs["rejected_log_sum_p2"]) / x.m_l
    weight = np.exp(mean_w + mean_l)
    weight = np.minimum(weight, 1.0) if clamp else weight
    loss, g_w, g_l = dpo(x)
    return weight * loss, weight * g_w, weight * g_l


def log_ratio(x: Points, space: str, normalization: str) -> Array:
    w, lo = (x.p_w, x.p_l) if space == "policy_ratio" else (x.r_w, x.r_l)
    return w / x.m_w - lo / x.m_l if normalization == "mean" else w - lo


def balanced(
    x: Points, b: float, c_w: Array | float, c_l: Array | float, placement: str = "gradient"
) -> tuple[Array, Array, Array]:
    z = b * (x.delta if placement == "gradient" else c_w * x.r_w - c_l * x.r_l)
    return -logsig(z), -b * sig(-z) * c_w, b * sig(-z) * c_l


def clip_ratio(value: Array, limit: float) -> Array:
    return exp(np.minimum(value, log(limit)))


def h_dpo(x: Points, b: float, a: float) -> tuple[Array, Array, Array]:
    z = a * b * (x.p_w - x.p_l) - b * (x.q_w - x.q_l)
    return both(-logsig(z), -a * b * sig(-z))


def shifted(x: Points, b: float, offset: Array) -> tuple[Array, Array, Array]:
    z = b * x.delta - offset
    return both(-logsig(z), -b * sig(-z))


def scaled(x: Points, b: float, factor: Array) -> tuple[Array, Array, Array]:
    z = factor * b * x.delta
    return both(-logsig(z), -factor * b * sig(-z))


def kto(x: Points, b: float, d: float, u: float, z: Array | float) -> tuple[Array, Array, Array]:
    w, lo = b * (x.r_w - z), b * (z - x.r_l)
    return d * sig(-w) + u * sig(-lo), -d * b * sig(w) * sig(-w), u * b * sig(lo) * sig(-lo)


def sgdpo(x: Points, b: float, e: float = 0.0) -> tuple[Array, Array, Array]:
    z_w, z_l = b * (x.r_w - x.inputs["rejected_pilot"]), b * (x.inputs["chosen_pilot"] - x.r_l)
    losses, slopes = zip(
        *[(-(1 - e) * logsig(z) - e * logsig(-z), (1 - e) * sig(-z) - e * sig(z)) for z in (z_w, z_l)], strict=True
    )
    return 0.5 * losses[0] + 0.5 * losses[1], -0.5 * b * slopes[0], 0.5 * b * slopes[1]


def bco(x: Points, b: float, shift: float = 0.0) -> tuple[Array, Array, Array]:
    w, lo = b * x.r_w - shift, b * x.r_l - shift
    return -logsig(w) - logsig(-lo), -b * sig(-w), b * sig(lo)


def nca(x: Points, b: float) -> tuple[Array, Array, Array]:
    w, lo = b * x.r_w, b * x.r_l
    loss = -logsig(w) - 0.5 * logsig(-w) - 0.5 * logsig(-lo)
    return loss, -b * sig(-w) + 0.5 * b * sig(w), 0.5 * b * sig(lo)


def sppo(x: Points, b: float, w: Array | float, lo: Array | float, factor: float = 1.0) -> tuple[Array, Array, Array]:
    e_w, e_l = x.r_w - (w - 0.5) / b, x.r_l - (lo - 0.5) / b
    return factor * 0.5 * (e_w**2 + e_l**2), factor * e_w, factor * e_l


def cal_dpo(x: Points, b: float) -> tuple[Array, Array, Array]:
    e_w, e_l = x.r_w - 1 / (2 * b), x.r_l + 1 / (2 * b)
    return -logsig(x.delta) + 0.5 * (e_w**2 + e_l**2), -sig(-x.delta) + e_w, sig(-x.delta) + e_l


def apo_zero(x: Points, b: float) -> tuple[Array, Array, Array]:
    w, lo = b * x.r_w, b * x.r_l
    return sig(-w) + sig(lo), -b * sig(w) * sig(-w), b * sig(lo) * sig(-lo)


def apo_down(x: Points, b: float) -> tuple[Array, Array, Array]:
    w, d = b * x.r_w, b * x.delta
    inner = b * sig(d) * sig(-d)
    return sig(w) + sig(-d), b * sig(w) * sig(-w) - inner, inner


def discopop(x: Points, b: float, tau: float) -> tuple[Array, Array, Array]:
    z = b * x.delta
    k, rest = sig(z / tau), sig(-z / tau)
    # k e^-z as one exponential
    blend = exp(logsig(z / tau) - z)
    slope = b * (-sig(-z) * rest - blend + rest * (blend + k * logsig(z)) / tau)
    return both(-logsig(z) * rest + blend, slope)


def score(r: Array, kind: str, a: float = 0.5) -> tuple[Array, Array]:
    """s(r) and ds/dr."""
    if kind == "forward_kl":
        e = exp(np.minimum(-r, 80))
        return 1 - e, e * (-r <= 80)
    if kind == "js_divergence":
        return log(2) + logsig(r), sig(-r)
    if kind == "alpha_divergence":
        t = (a - 1) * r
        e = exp(np.minimum(t, 80))
        return (e - 1) / (a - 1), e * (t <= 80)
    return r, np.ones_like(r)


def divergence(base: Callable, kind: str, a: float = 0.5) -> Callable:
    """The base on scores, by the chain rule."""

    def composed(x: Points) -> tuple[Array, Array, Array]:
        (s_w, d_w), (s_l, d_l) = score(x.r_w, kind, a), score(x.r_l, kind, a)
        zero = np.zeros_like(s_w)
        loss, g_w, g_l = base(Points(s_w, s_l, zero, zero, x.n_w, x.n_l, x.inputs))
        return loss, g_w * d_w, g_l * d_l

    return composed


def chi_po(
    x: Points, b: float, bound: float = 10.0, a: float = 1.0, g: float = 1.0, limit: float = 20.0
) -> tuple[Array, Array, Array]:
    t_w, t_l = a * x.r_w, a * x.r_l
    e_w, e_l = exp(np.clip(t_w, -88, limit)), exp(np.clip(t_l, -88, limit))
    raw = b * (e_w - e_l + g * x.delta)
    z, inside = np.clip(raw, -2 * bound, 2 * bound), np.abs(raw) <= 2 * bound
    d_w, d_l = (g + a * e * (np.clip(t, -88, limit) == t) for e, t in ((e_w, t_w), (e_l, t_l)))
    return -logsig(z), -b * sig(-z) * d_w * inside, b * sig(-z) * d_l * inside


def spo_hinge_input(x: Points, base: Callable, weight: float, epsilon: float) -> tuple[Array, Array, Array]:
    """base + weight max(0, -p_w - v - ε)."""
    loss, g_w, g_l = base(x)
    gap = -x.p_w - x.inputs["spo_value"] - epsilon
    return loss + weight * np.maximum(gap, 0), g_w - weight * (gap >= 0), g_l


def spo_hinge(base: Callable, weight: float, epsilon: float) -> Callable:
    """base + weight max(0, -r_w / n_w - ε)."""

    def composed(x: Points) -> tuple[Array, Array, Array]:
        loss, g_w, g_l = base(x)
        gap = -x.r_w / x.m_w - epsilon
        return loss + weight * np.maximum(gap, 0), g_w - weight * (gap >= 0) / x.m_w, g_l

    return composed
