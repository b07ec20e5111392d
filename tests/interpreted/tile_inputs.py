"""Tiles, transforms and a comparison, for the tests in this folder."""

import torch

from spo_kernels.backends.contract import LogitTransform

ROWS = 5
PLAIN = LogitTransform()
# PLAIN is a scale of 1: no kernel has code of its own for it
TRANSFORMS = {"scale": LogitTransform(0.7), "softcap": LogitTransform(1.5, 3.0)}
ALL_OUTPUTS = ("lse", "correct", "entropy", "log_sum_p2")


def made(columns, bias=False, seed=0, spread=4.0):
    """A tile, its bias and labels inside, at both ends and outside of it."""
    generator = torch.Generator().manual_seed(seed)
    tile = spread * torch.randn(ROWS, columns, generator=generator)
    labels = torch.tensor([columns // 2, 0, columns - 1, -(2**40), columns])
    values = None
    if bias:
        values = torch.randn(columns, generator=generator)
        if columns > 1:
            values[columns // 3] = -torch.inf
    return tile, values, labels


def logits64(product, bias, transform):
    """The specification's logits in float64."""
    logits = product if bias is None else product + bias.double()
    logits = logits * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


def close(actual, expected, tolerance=2e-6):
    """Within float32 rounding of float64, infinities and all."""
    expected = torch.as_tensor(expected)
    scale = expected.abs().masked_fill(expected.isinf(), 0.0).clamp_min(1.0)
    same = actual.double() == expected.double()
    error = ((actual.double() - expected.double()).abs() / scale).masked_fill(same, 0.0)
    assert error.isfinite().all() and error.max() <= tolerance, f"worst error {error.max():.3g}"
