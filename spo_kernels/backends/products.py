"""Matrix products with results in the accumulator dtype: float64 for float64 inputs, else float32."""

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from spo_kernels.backends import environment

HALF_DTYPES = (torch.float16, torch.bfloat16)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and sums: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Products(Protocol):
    """Who multiplies."""

    row_bytes: int  # temporaries per row of `a`, beyond operands and result

    def operand_dtype(self, inputs: Tensor) -> torch.dtype:
        """The dtype in which `inputs` enter a product."""
        ...

    def tile_dtype(self, inputs: Tensor) -> torch.dtype:
        """The dtype in which a tile enters a product with `inputs`: rounded to theirs, or as it is."""
        ...

    def reads_row_lists(self, inputs: Tensor) -> bool:
        """Whether listed rows of `inputs` are read in place, not copied first."""
        ...

    def rounds(self, inputs: Tensor, terms: int) -> bool:
        """Whether sums of so many products with `inputs` may go to an `out` of their dtype, rounded once."""
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
    """The vendor library through torch, on any device.

    CUDA multiplies half precision into float32. The CPU library has no such product, nor have some ROCm builds,
    and a half-precision result would cost about 0.9 nat per 512-token sequence: operands are upcast there.
    """

    row_bytes = 0

    def operand_dtype(self, inputs: Tensor) -> torch.dtype:
        """See `Products`."""
        if inputs.dtype in HALF_DTYPES and not (inputs.is_cuda and _half_products(inputs.device, inputs.dtype)):
            return torch.float32
        return inputs.dtype

    def tile_dtype(self, inputs: Tensor) -> torch.dtype:
        """See `Products`."""
        dtype = self.operand_dtype(inputs)
        return dtype if dtype in HALF_DTYPES else accumulator_dtype(inputs.dtype)

    def reads_row_lists(self, inputs: Tensor) -> bool:
        """See `Products`."""
        return False

    def rounds(self, inputs: Tensor, terms: int) -> bool:
        """See `Products`; CUDA's libraries may round partial sums on the way, too."""
        return False

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
        _check_row_lists(out, a_rows=a_rows, b_rows=b_rows, out_rows=out_rows)
        a = a if a_rows is None else a.index_select(0, a_rows)
        b = b if b_rows is None else b.index_select(0, b_rows)
        a = a.to(b.dtype)
        if out_rows is not None:
            part = out.new_empty((a.shape[0], b.shape[1]))
            _multiply(a, b, part, accumulate=False)
            out.index_add_(0, out_rows, part) if accumulate else out.index_copy_(0, out_rows, part)
        else:
            _multiply(a, b, out, accumulate=accumulate)


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool) -> None:
    if b.dtype != out.dtype and accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif b.dtype != out.dtype:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def _check_row_lists(out: Tensor, **lists: Tensor | None) -> None:
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


class NativeProducts(VendorProducts):
    """The extension's own products on a CPU, for any strides and half precision in, float32 out.

    Used where they are the faster ones. float32: on AMD, where the vendor library runs at about half the
    machine's rate; not measured elsewhere. Half precision: wherever the vendor would need an upcast.
    """

    _SCALARS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # noqa: RUF012
    row_bytes = 4096  # the panels of `a`: 512 floats or 2048 bfloat16 a row

    def __init__(self, native: Any) -> None:
        self._native = native
        names = set(native.product_names())
        choice = environment.cpu_product()
        full = next((name for name in ("avx512", "avx2") if name in names), None)
        self._half_name = None if choice == "vendor" else full
        self._float_name = full if choice == "native" or (choice == "auto" and native.made_by_amd()) else None
        has_bf16 = choice != "vendor" and "avx512_bf16" in names
        self._bf16_name = "avx512_bf16" if has_bf16 else self._half_name

    def _name(self, dtype: torch.dtype) -> str | None:
        if dtype == torch.bfloat16:
            return self._bf16_name
        return self._half_name if dtype == torch.float16 else self._float_name

    def operand_dtype(self, inputs: Tensor) -> torch.dtype:
        """See `Products`."""
        return inputs.dtype if self._name(inputs.dtype) else super().operand_dtype(inputs)

    def tile_dtype(self, inputs: Tensor) -> torch.dtype:
        """See `Products`; the float32 product takes half-precision operands beside a tile as it is."""
        return inputs.dtype if self._name(inputs.dtype) == "avx512_bf16" else accumulator_dtype(inputs.dtype)

    def reads_row_lists(self, inputs: Tensor) -> bool:
        """See `Products`."""
        return self._name(inputs.dtype) is not None

    def rounds(self, inputs: Tensor, terms: int) -> bool:
        """See `Products`."""
        return self._name(inputs.dtype) == "avx512_bf16" and terms <= self._native.rounded_depth

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
        """See `Products`; listed rows are read while an operand is packed, and written where they belong."""
        name = self._name(b.dtype)
        if name is None:
            super().matmul(a, b, out, accumulate=accumulate, a_rows=a_rows, b_rows=b_rows, out_rows=out_rows)
            return
        _check_row_lists(out, a_rows=a_rows, b_rows=b_rows, out_rows=out_rows)
        m, k, n = _rows(a, a_rows), a.shape[1], b.shape[1]
        if (
            (_rows(b, b_rows), _rows(out, out_rows), out.shape[1]) != (k, m, n)
            or (out.dtype != torch.float32 and (accumulate or out.dtype != b.dtype or not self.rounds(b, k)))
            or out.stride(1) != 1
        ):
            raise ValueError(
                f"out must be a float32 [{m}, {n}] matrix with unit column stride for operands "
                f"[{m}, {k}] and [{_rows(b, b_rows)}, {n}], got {out.dtype} [{_rows(out, out_rows)}, {out.shape[1]}]"
            )
        self._native.product(
            name,
            a=self._operand(a, a_rows),
            b=self._operand(b, b_rows),
            out=(out.data_ptr(), out.stride(0), self._SCALARS[out.dtype], *_address(out, out_rows)),
            m=m,
            n=n,
            k=k,
            accumulate=accumulate,
            threads=torch.get_num_threads(),
        )

    def _operand(self, matrix: Tensor, rows: Tensor | None) -> tuple[int, ...]:
        return (matrix.data_ptr(), *matrix.stride(), self._SCALARS[matrix.dtype], *_address(matrix, rows))


def _rows(matrix: Tensor, rows: Tensor | None) -> int:
    return matrix.shape[0] if rows is None else rows.shape[0]


def _address(matrix: Tensor, rows: Tensor | None) -> tuple[int, int]:
    """A row list for the extension, which checks its range: address (0: none), and how many rows the matrix has."""
    return (0 if rows is None else rows.data_ptr(), matrix.shape[0])
