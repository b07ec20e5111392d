"""Matrix products with float32 results from any input dtype, by the vendor library through torch."""

import torch
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and sums: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(inputs: Tensor) -> torch.dtype:
    """The dtype in which `inputs` enter a product.

    CUDA multiplies half precision into float32. The CPU library has no such product, and its half-precision
    result would cost about 0.9 nat per 512-token sequence, so half-precision tiles are upcast there.
    """
    if inputs.dtype in HALF_DTYPES and not inputs.is_cuda:
        return torch.float32
    return inputs.dtype


def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b` with `out` in the accumulator dtype."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def matmul_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out += a @ b` with `out` in the accumulator dtype; `a` is cast to `b`'s dtype."""
    a = a.to(b.dtype)
    if b.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
