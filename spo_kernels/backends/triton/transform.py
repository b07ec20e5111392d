"""Device functions that every tile kernel shares: from products to logits and back.

`logit = c tanh(scale (product + bias) / c)` (without c: the scaled sum) and `d logit / d product =
scale (1 - (logit / c)²)`. Everything is float32 in registers, whatever the dtype in memory.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # for small x, (1 - e^-2x) / (1 + e^-2x) loses its digits in the subtraction; the series is exact to 1e-8 here
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    magnitude = tl.abs(x)
    decay = tl.exp(-2.0 * magnitude)
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(magnitude < 0.25, x * series, tl.where(x < 0.0, -large, large))


@triton.jit
def load_logits(tile_row_ptr, bias_ptr, offs, columns, scale, softcap):
    """Logits of one row at columns `offs`; -inf beyond the last."""
    mask = offs < columns
    logits = tl.load(tile_row_ptr + offs, mask=mask, other=-float("inf")).to(tl.float32)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    logits *= scale
    if softcap is not None:
        logits = softcap * _tanh(logits / softcap)
    return tl.where(mask, logits, -float("inf"))


@triton.jit
def slope(logits, scale, softcap):
    """d logit / d product, from the logit."""
    if softcap is None:
        return scale
    else:
        ratio = logits / softcap
        return scale * (1.0 - ratio * ratio)


@triton.jit
def load_label(labels_ptr, row, columns):
    """The row's label as a column of the tile; -1, which no column equals, where it lies outside."""
    label = tl.load(labels_ptr + row)
    return tl.where((label >= 0) & (label < columns), label, -1).to(tl.int32)
