"""Gradient of the loss with respect to a tile of products.

With `l = softcap(scale (x + bias))`, `p = e^(l - lse)`, entropy H, and upstream gradients g of logp, e of lse,
h of the entropy, r of log Σ p²:

    d loss/dx = [g (onehot - p) + e p - h p (log p + H) + 2 r (p² / Σp² - p)] dl/dx

Bytes moved per logit (x is float32): one read and one write, 4 + 2 into a half-precision operand or 4 + 4 in place.
Biases add 4 from L2; per-row values are not counted.
"""

import torch
import triton
import triton.language as tl

from spo_kernels.backends.contract import Tile, TokenGrads
from spo_kernels.backends.triton.config import Launch, architecture_of, resolve, tuned
from spo_kernels.backends.triton.transform import load_label, load_logits, slope


@tuned("tile_grad", changes=("tile_ptr",))
@triton.jit
def _tile_grad_kernel(
    tile_ptr,
    bias_ptr,
    labels_ptr,
    lse_ptr,
    grad_logp_ptr,
    grad_lse_ptr,
    grad_entropy_ptr,
    entropy_ptr,
    grad_log_sum_p2_ptr,
    log_sum_p2_ptr,
    lse_rest_ptr,
    out_ptr,
    columns,
    tile_stride,
    out_stride,
    scale,
    softcap,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    blocks = tl.cdiv(columns, UNROLL * LANES)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * UNROLL * LANES
    offs = start + tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]

    logits = load_logits(tile_ptr + row * tile_stride, bias_ptr, offs, columns, scale, softcap)
    log_p = logits - tl.load(lse_ptr + row)
    if lse_rest_ptr is not None:
        log_p -= tl.load(lse_rest_ptr + row)
    p = tl.exp(log_p)
    weight = 0.0
    if grad_logp_ptr is not None:
        grad_logp = tl.load(grad_logp_ptr + row)
        weight -= grad_logp
    if grad_lse_ptr is not None:
        weight += tl.load(grad_lse_ptr + row)
    if grad_log_sum_p2_ptr is not None:
        grad_log_sum_p2 = tl.load(grad_log_sum_p2_ptr + row)
        weight -= 2.0 * grad_log_sum_p2
    grad = p * weight
    if grad_entropy_ptr is not None:
        # where p is 0, p log p is 0 too, not 0 * -inf
        information = tl.where(p == 0.0, 0.0, log_p + tl.load(entropy_ptr + row))
        grad -= tl.load(grad_entropy_ptr + row) * p * information
    if grad_log_sum_p2_ptr is not None:
        grad += 2.0 * grad_log_sum_p2 * tl.exp(2.0 * log_p - tl.load(log_sum_p2_ptr + row))
    if grad_logp_ptr is not None:
        label = load_label(labels_ptr, row, columns)
        grad = tl.where(offs == label, grad + grad_logp, grad)
    grad *= slope(logits, scale, softcap)
    tl.store(out_ptr + row * out_stride + offs, grad.to(out_ptr.dtype.element_ty), mask=offs < columns)


def tile_grad(tile: Tile, grads: TokenGrads, *, launch: Launch | None = None) -> None:
    """See `Backend.tile_grad`; rows may be strided, columns not. `launch` overrides the table."""
    products, out = tile.products, tile.written
    rows, columns = products.shape
    kernel, options = resolve(_tile_grad_kernel, "tile_grad", architecture_of(products.device), launch)
    with torch.cuda.device_of(products):
        kernel[lambda meta: (rows * triton.cdiv(columns, meta["UNROLL"] * meta["LANES"]),)](
            tile_ptr=products,
            bias_ptr=tile.bias,
            labels_ptr=tile.labels,
            lse_ptr=grads.lse_value,
            grad_logp_ptr=grads.logp,
            grad_lse_ptr=grads.lse,
            grad_entropy_ptr=grads.entropy,
            entropy_ptr=grads.entropy_value,
            grad_log_sum_p2_ptr=grads.log_sum_p2,
            log_sum_p2_ptr=grads.log_sum_p2_value,
            lse_rest_ptr=grads.lse_rest,
            out_ptr=out,
            columns=columns,
            tile_stride=products.stride(0),
            out_stride=out.stride(0),
            scale=tile.transform.scale,
            softcap=tile.transform.softcap,
            **options,
        )
