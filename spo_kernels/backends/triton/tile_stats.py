"""Softmax statistics of a tile of products, merged into running ones.

With `l = softcap(scale (x + bias))`, and m the maximum over the columns seen so far:

    sum = Σ e^(l-m)    shifted_sum = Σ e^(l-m) (l-m)    square_sum = Σ e^2(l-m)    label_logit = l[label]

and, with `out`, `out = e^(l-m) dl/dx` (0 at the label) with `rescale = e^(old m - m)`.

Bytes moved per logit (x is float32): 4, one read. With `out`: one read and one write, 4 + 2 into a half-precision
operand or 4 + 4 in place. e^(l-m) needs the row's maximum before the first write, so the row waits in registers:
up to 8192 columns fit, the width of the driver's tiles. A wider row is read twice, 4 + 4 + 2, the second time mostly
from L2, because one program makes both passes. Two launches would read it from memory twice; writing against a
running maximum would leave each block on a scale of its own, which the product over columns cannot undo.
Block masses add 4 / MASS_BLOCK bytes, biases 4 from L2; per-row values are not counted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spo_kernels.backends.contract import MASS_BLOCK, Tile, TokenStats
from spo_kernels.backends.triton.config import (
    WHOLE_ROW_COLUMNS,
    Launch,
    architecture_of,
    loop_twice,
    resolve,
    tuned,
    whole_row,
    with_masses,
)
from spo_kernels.backends.triton.transform import load_label, load_logits, slope


@triton.jit
def _accumulate(logits, m, s, t, q, MOMENTS: tl.constexpr):
    """Merge `[UNROLL, LANES]` logits into each lane's maximum and sums; no lane waits for another."""
    new_m = tl.maximum(m, tl.max(logits, 0))
    # a lane whose columns so far are all -inf would otherwise give exp(-inf + inf) = nan
    base = tl.where(new_m == -float("inf"), 0.0, new_m)
    shifted = logits - base[None, :]
    exponential = tl.exp(shifted)
    shrink = tl.exp(m - base)
    if MOMENTS:
        drop = tl.where(s == 0.0, 0.0, m - base)
        # exp(-inf) * -inf counts as 0
        moment = tl.where(exponential == 0.0, 0.0, exponential * shifted)
        t = (t + s * drop) * shrink + tl.sum(moment, 0)
        q = q * shrink * shrink + tl.sum(exponential * exponential, 0)
    s = s * shrink + tl.sum(exponential, 0)
    return new_m, s, t, q


@triton.jit
def _store_block_lse(logits, block_lse_row_ptr, start, columns, UNROLL, LANES, MASS_BLOCK: tl.constexpr):
    """Log-sum-exp of every MASS_BLOCK neighbours."""
    grouped = tl.reshape(logits, (UNROLL, LANES // MASS_BLOCK, MASS_BLOCK))
    m = tl.max(grouped, 2)
    base = tl.where(m == -float("inf"), 0.0, m)
    total = tl.sum(tl.exp(grouped - base[:, :, None]), 2)
    steps = tl.arange(0, UNROLL)[:, None] * (LANES // MASS_BLOCK) + tl.arange(0, LANES // MASS_BLOCK)[None, :]
    block = start // MASS_BLOCK + steps
    tl.store(block_lse_row_ptr + block, base + tl.log(total), mask=block * MASS_BLOCK < columns)


@triton.jit
def _store_exponentials(logits, out_row_ptr, offs, columns, base, label, scale, softcap):
    value = tl.exp(logits - base) * slope(logits, scale, softcap)
    value = tl.where(offs == label, 0.0, value)
    tl.store(out_row_ptr + offs, value.to(out_row_ptr.dtype.element_ty), mask=offs < columns)


@tuned("tile_stats", changes=("max_ptr", "sum_ptr", "label_logit_ptr", "shifted_sum_ptr", "square_sum_ptr"))
@triton.jit
def _tile_stats_kernel(
    tile_ptr,
    bias_ptr,
    labels_ptr,
    max_ptr,
    sum_ptr,
    label_logit_ptr,
    shifted_sum_ptr,
    square_sum_ptr,
    block_lse_ptr,
    rescale_ptr,
    out_ptr,
    columns,
    tile_stride,
    out_stride,
    block_lse_stride,
    scale,
    softcap,
    MASS_BLOCK: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile_row_ptr = tile_ptr + row * tile_stride
    label = load_label(labels_ptr, row, columns)
    lanes = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    MOMENTS: tl.constexpr = shifted_sum_ptr is not None

    m = tl.full([LANES], -float("inf"), tl.float32)
    hit = tl.full([LANES], -float("inf"), tl.float32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    q = tl.zeros([LANES], tl.float32)
    if WHOLE_ROW:
        logits = load_logits(tile_row_ptr, bias_ptr, lanes, columns, scale, softcap)
        hit = tl.max(tl.where(lanes == label, logits, -float("inf")), 0)
        m, s, t, q = _accumulate(logits, m, s, t, q, MOMENTS)
    else:
        for start in range(0, columns, UNROLL * LANES):
            offs = start + lanes
            logits = load_logits(tile_row_ptr, bias_ptr, offs, columns, scale, softcap)
            # the label's logit comes from the same registers as the maximum: equal means equal, to the bit
            hit = tl.maximum(hit, tl.max(tl.where(offs == label, logits, -float("inf")), 0))
            m, s, t, q = _accumulate(logits, m, s, t, q, MOMENTS)
            if block_lse_ptr is not None:
                block_lse_row_ptr = block_lse_ptr + row * block_lse_stride
                _store_block_lse(logits, block_lse_row_ptr, start, columns, UNROLL, LANES, MASS_BLOCK)

    old_m = tl.load(max_ptr + row)
    old_s = tl.load(sum_ptr + row)
    new_m = tl.maximum(old_m, tl.max(m, 0))
    base = tl.where(new_m == -float("inf"), 0.0, new_m)
    shrink = tl.exp(old_m - base)
    lane_shrink = tl.exp(m - base)
    tl.store(max_ptr + row, new_m)
    tl.store(sum_ptr + row, old_s * shrink + tl.sum(s * lane_shrink, 0))
    if label >= 0:
        tl.store(label_logit_ptr + row, tl.max(hit, 0))
    if MOMENTS:
        old_t = tl.load(shifted_sum_ptr + row) + old_s * tl.where(old_s == 0.0, 0.0, old_m - base)
        lane_t = t + s * tl.where(s == 0.0, 0.0, m - base)
        tl.store(shifted_sum_ptr + row, old_t * shrink + tl.sum(lane_t * lane_shrink, 0))
        old_q = tl.load(square_sum_ptr + row)
        lane_q = q * lane_shrink * lane_shrink
        tl.store(square_sum_ptr + row, old_q * shrink * shrink + tl.sum(lane_q, 0))

    if out_ptr is not None:
        tl.store(rescale_ptr + row, shrink)
        out_row_ptr = out_ptr + row * out_stride
        if WHOLE_ROW:
            _store_exponentials(logits, out_row_ptr, lanes, columns, base, label, scale, softcap)
        else:
            for start in range(0, columns, UNROLL * LANES):
                offs = start + lanes
                logits = load_logits(tile_row_ptr, bias_ptr, offs, columns, scale, softcap)
                _store_exponentials(logits, out_row_ptr, offs, columns, base, label, scale, softcap)


def tile_stats(
    tile: Tile,
    stats: TokenStats,
    *,
    rescale: Tensor | None = None,
    block_lse: Tensor | None = None,
    launch: Launch | None = None,
) -> None:
    """See `Backend.tile_stats`; rows may be strided, columns not.

    Args:
        block_lse: `[R, ceil(C / MASS_BLOCK)]` float32, receives the log-sum-exp of each vocabulary block; not
            together with `rescale`.
        launch: Overrides the table; a block narrower than the tile makes the kernel loop.
    """
    products = tile.products
    rows, columns = products.shape
    # without `rescale` nothing is written
    out = None if rescale is None else tile.written
    architecture = architecture_of(products.device)
    whole = launch is None and out is not None and columns <= WHOLE_ROW_COLUMNS
    if out is not None and launch is None:
        narrow = out.dtype.itemsize == 2
        launch = whole_row(columns, architecture, narrow) if whole else loop_twice(architecture, narrow)
    if block_lse is not None and launch is None:
        launch = with_masses(architecture)
    kernel, options = resolve(_tile_stats_kernel, "tile_stats", architecture, launch)
    with torch.cuda.device_of(products):
        kernel[(rows,)](
            tile_ptr=products,
            bias_ptr=tile.bias,
            labels_ptr=tile.labels,
            max_ptr=stats.max,
            sum_ptr=stats.sum,
            label_logit_ptr=stats.label_logit,
            shifted_sum_ptr=stats.shifted_sum,
            square_sum_ptr=stats.square_sum,
            block_lse_ptr=block_lse,
            rescale_ptr=rescale,
            out_ptr=out,
            columns=columns,
            tile_stride=products.stride(0),
            out_stride=0 if out is None else out.stride(0),
            block_lse_stride=0 if block_lse is None else block_lse.stride(0),
            scale=tile.transform.scale,
            softcap=tile.transform.softcap,
            MASS_BLOCK=MASS_BLOCK,
            WHOLE_ROW=whole,
            **options,
        )
