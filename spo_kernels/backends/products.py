"""Matrix products with results in the accumulator dtype: float64 for float64 inputs, else float32."""

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from spo_kernels.backends.strict import strict

HALF_DTYPES = (torch.float16, torch.bfloat16)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and sums: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Products(Protocol):
    """The matrix products of a backend, and in which dtypes matrices enter them.

    A walk over tiles multiplies hidden states with a slice of the head's weight (logits), and what a tile pass made of
    that with both of them again (gradients). Results are in the accumulator dtype whatever the inputs are.
    """

    row_bytes: int  # temporaries per row of `a`, beyond operands and result

    def operand_dtype(self, inputs: Tensor) -> torch.dtype:
        """The dtype to which `inputs` (hidden states, the head's weight) must be cast before a product."""
        ...

    def own_product(self, dtype: torch.dtype) -> str | None:
        """The name of the library's own product for operands of a dtype; None where torch multiplies."""
        ...

    def tile_dtype(self, inputs: Tensor) -> torch.dtype:
        """The dtype in which a tile enters a product with `inputs`: rounded to theirs, or as it is."""
        ...

    def reads_row_lists(self, inputs: Tensor) -> bool:
        """Whether listed rows of `inputs` are read in place; else `matmul` copies them first."""
        ...

    def can_round(self, inputs: Tensor, terms: int) -> bool:
        """Whether `out` may have the dtype of `inputs` where each element is a sum of `terms` products.

        The sum is still taken in the accumulator dtype, and rounded once as it is written.
        """
        ...

    def matmul(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        *,
        accumulate: bool = False,
        a_rows: Tensor | None = None,
        b_rows: Tensor | None = None,
        out_rows: Tensor | None = None,
    ) -> None:
        """`out = a @ b`, or `out += a @ b`; `a` may be in the accumulator dtype where `b` is half precision.

        Row lists (int64 vectors on the operands' device) stand for `a[a_rows]`, `b[b_rows]` and `out[out_rows]`, so
        `out[out_rows] (+)= a[a_rows] @ b[b_rows]`; the other rows of `out` stay as they are. Rows of `a` and `b` may
        repeat, those of `out` must be distinct.

        Raises:
            ValueError: a row list is no contiguous int64 vector on the operands' device.
            IndexError: a row is outside its matrix; on CUDA a device-side assertion.
        """
        ...


class VendorProducts:
    """The machine's own library through torch, on any device.

    CUDA multiplies half precision into float32. The CPU library has no such product, nor have some ROCm builds,
    and a half-precision result would cost about 0.9 nat per 512-token sequence: operands are upcast there.
    """

    row_bytes = 0

    def operand_dtype(self, inputs: Tensor) -> torch.dtype:
        """See `Products`."""
        if inputs.dtype in HALF_DTYPES and not (inputs.is_cuda and _half_products(inputs.device, inputs.dtype)):
            return torch.float32
        return inputs.dtype

    def own_product(self, dtype: torch.dtype) -> str | None:
        """See `Products`."""
        return None

    def tile_dtype(self, inputs: Tensor) -> torch.dtype:
        """See `Products`."""
        dtype = self.operand_dtype(inputs)
        return dtype if dtype in HALF_DTYPES else accumulator_dtype(inputs.dtype)

    def reads_row_lists(self, inputs: Tensor) -> bool:
        """See `Products`."""
        return False

    def can_round(self, inputs: Tensor, terms: int) -> bool:
        """See `Products`; CUDA's library can be told not to round partial sums on the way."""
        return inputs.is_cuda and inputs.dtype == torch.bfloat16 and torch.version.hip is None

    def matmul(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        *,
        accumulate: bool = False,
        a_rows: Tensor | None = None,
        b_rows: Tensor | None = None,
        out_rows: Tensor | None = None,
    ) -> None:
        """See `Products`; listed rows are copied: `index_select`, then `index_copy_` or `index_add_`."""
        if not (a_rows is b_rows is out_rows is None):
            check_row_lists(out, a_rows=a_rows, b_rows=b_rows, out_rows=out_rows)
            a = a if a_rows is None else a.index_select(0, a_rows)
            b = b if b_rows is None else b.index_select(0, b_rows)
        if a.dtype != b.dtype:
            a = a.to(b.dtype)
        if out_rows is not None:
            part = out.new_empty((a.shape[0], b.shape[1]))
            _multiply(a, b, part, accumulate=False)
            out.index_add_(0, out_rows, part) if accumulate else out.index_copy_(0, out_rows, part)
        else:
            _multiply(a, b, out, accumulate=accumulate)


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool) -> None:
    with strict(out.device, b.dtype, out.dtype):
        if b.dtype != out.dtype and accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        elif b.dtype != out.dtype:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        elif accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)


def check_row_lists(out: Tensor, **lists: Tensor | None) -> None:
    """Contiguous int64 vectors on the device of `out`; their values are checked by what reads them.

    Raises:
        ValueError: Something else; the message names it.
    """
    for name, rows in lists.items():
        if rows is None:
            continue
        if rows.dtype != torch.int64 or rows.ndim != 1 or not rows.is_contiguous() or rows.device != out.device:
            raise ValueError(
                f"{name} must be a contiguous int64 vector on {out.device}, "
                f"got {rows.dtype} {list(rows.shape)} on {rows.device}"
            )


@cache
def _half_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether half-precision operands can give a float32 product; on ROCm that is found out by asking for one."""
    if torch.version.hip is None:
        return True
    operand = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(operand, operand, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def headroom(upstream: list[Tensor], factor: float) -> Tensor | None:
    """A power of two by which upstream gradients are divided while float16 tiles hold their products.

    float16 spans 6e-8 to 65504. With the largest |upstream * factor| brought to between 1024 and 2048, tile entries
    (at most 17 times that, with entropy's) stay below 35000, and probabilities down to 6e-8 keep all their digits.
    """
    # a NaN or an infinity spoils its own token's gradients, not the scale of the others'
    finite = [torch.where(values.isfinite(), values.abs(), 0.0).amax() for values in upstream if values.numel()]
    if not finite:
        return None
    largest = torch.stack(finite).amax() * abs(factor)
    _, exponent = torch.frexp(largest)
    return torch.where(largest > 0.0, torch.ldexp(torch.ones_like(largest), exponent - 11), 1.0)
