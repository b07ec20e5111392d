"""Random numbers as a function of a seed and two counters: the same on every device and in every process.

SplitMix64 (Steele, Lea, Flood 2014) in int64 arithmetic, which wraps around. No generator has a state to save.
"""

import torch
from torch import Tensor

# the three constants of SplitMix64, as signed numbers
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def uniforms(count: int, seed: int, step: Tensor) -> Tensor:
    """`[count]` float64 numbers strictly between 0 and 1, on the device of `step`, a 0-d tensor."""
    stream = _mix(torch.full_like(step, seed, dtype=torch.int64) + (step.long() + 1) * _GOLDEN)
    bits = _mix(stream + torch.arange(1, count + 1, device=step.device) * _GOLDEN)
    # 52 bits and a half: with 53 the largest would round to 1
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52


def draw_without_replacement(log_weights: Tensor, size: int, seed: int, step: Tensor) -> Tensor:
    """`[size]` different indices into `log_weights` `[n]`, one after the other with probabilities `∝ exp(log_weights)`.

    The largest of log-weights with Gumbel noise added are such a draw (Vieira 2014; Kool et al., arXiv 1903.06059).
    """
    noise = -torch.log(-torch.log(uniforms(log_weights.numel(), seed, step)))
    return (log_weights.double() + noise).topk(size).indices


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left: int64's own shift repeats the sign."""
    return (value >> bits) & (2 ** (64 - bits) - 1)
