"""Multiplies rows: `x[r, :] *= factors[r]`, where the factor is not 1.

Of the running sums of the frozen-head forward, where a row's factor `e^(old max - new max)` is 1 unless this tile
raised its maximum, which tile k does with probability about 1/k; and of kept tiles, in the dtype of the products.
Bytes moved per element: its size twice in rows that change, 0 in the others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spo_kernels.backends.triton.config import Launch, architecture_of, resolve


@triton.jit
def _scale_rows_kernel(x_ptr, factors_ptr, columns, x_stride, UNROLL: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors_ptr + row)
    if factor != 1.0:
        offs = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        for start in range(0, columns, UNROLL * LANES):
            pointers = x_ptr + row * x_stride + start + offs
            mask = start + offs < columns
            scaled = tl.load(pointers, mask=mask).to(tl.float32) * factor
            tl.store(pointers, scaled.to(x_ptr.dtype.element_ty), mask=mask)


def scale_rows(x: Tensor, factors: Tensor, *, launch: Launch | None = None) -> None:
    """See `Backend.scale_rows`."""
    kernel, options = resolve(_scale_rows_kernel, "scale_rows", architecture_of(x.device), launch)
    with torch.cuda.device_of(x):
        kernel[(x.shape[0],)](
            x_ptr=x,
            factors_ptr=factors,
            columns=x.shape[1],
            x_stride=x.stride(0),
            **options,
        )
