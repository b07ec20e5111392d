"""The C++ extension's own matrix products, and the choice between them and the machine's library."""

from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends import environment
from spo_kernels.backends.contract import SCALARS
from spo_kernels.backends.products import VendorProducts, accumulator_dtype, check_row_lists

# float32 products with at most so many rows or columns are the vendor's where the choice is free: ours packs the matrix
# first. With one it takes 0.3 to 0.8 of our time, with two 0.4 to 0.9 or, by the strides, more (AMD Zen 3)
NARROW = 2


# the product that takes and writes narrow tiles
_ROUNDING = "avx512_bf16"


class NativeProducts(VendorProducts):
    """The extension's own products on a CPU, for any strides and half precision in, float32 out.

    Used where they are the faster ones. float32: on AMD, where the vendor library leaves AVX-512 unused, and with AVX2
    alone takes 1.05 to 1.35 times as long (Zen 3). Half precision: wherever the vendor would need an upcast.
    """

    row_bytes = 4096  # the panels of `a`: twice 512 floats or once 2048 bfloat16 a row

    def __init__(self, native: Any) -> None:
        self._native = native
        names = set(native.product_names())
        choice = environment.cpu_product()
        full = next((name for name in ("avx512", "avx2") if name in names), None)
        own_float = choice == "native" or (choice == "auto" and native.made_by_amd())
        own_half = None if choice == "vendor" else full
        self._narrow = NARROW if choice == "auto" else 0
        has_bf16 = choice != "vendor" and _ROUNDING in names
        # which product serves a dtype of `b`; None: the vendor's
        self._names: dict[torch.dtype, str | None] = {
            torch.float32: full if own_float else None,
            torch.float16: own_half,
            torch.bfloat16: _ROUNDING if has_bf16 else own_half,
        }

    def operand_dtype(self, inputs: Tensor) -> torch.dtype:
        """See `Products`."""
        return inputs.dtype if self._names.get(inputs.dtype) else super().operand_dtype(inputs)

    def own_product(self, dtype: torch.dtype) -> str | None:
        """See `Products`."""
        return self._names.get(dtype)

    def tile_dtype(self, inputs: Tensor) -> torch.dtype:
        """See `Products`; the float32 product takes half-precision operands beside a tile as it is."""
        return inputs.dtype if self._rounds(inputs.dtype) else accumulator_dtype(inputs.dtype)

    def reads_row_lists(self, inputs: Tensor) -> bool:
        """See `Products`."""
        return self._names.get(inputs.dtype) is not None

    def can_round(self, inputs: Tensor, terms: int) -> bool:
        """See `Products`."""
        return self._rounds(inputs.dtype) and terms <= self._native.rounded_depth

    def _rounds(self, dtype: torch.dtype) -> bool:
        return self._names.get(dtype) == _ROUNDING

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
        name = self._names.get(b.dtype)
        whole = a_rows is b_rows is out_rows is None
        narrow = whole and out.dtype == a.dtype == b.dtype == torch.float32 and min(out.shape) <= self._narrow
        if name is None or narrow:
            super().matmul(a, b, out, accumulate=accumulate, a_rows=a_rows, b_rows=b_rows, out_rows=out_rows)
            return
        if not whole:
            check_row_lists(out, a_rows=a_rows, b_rows=b_rows, out_rows=out_rows)
        a_shape, b_shape, out_shape = a.shape, b.shape, out.shape
        m, terms, out_rows_given = a_shape[0], b_shape[0], out_shape[0]
        if a_rows is not None:
            m = a_rows.shape[0]
        if b_rows is not None:
            terms = b_rows.shape[0]
        if out_rows is not None:
            out_rows_given = out_rows.shape[0]
        k, n = a_shape[1], b_shape[1]
        row_stride, column_stride = out.stride()
        if (
            terms != k
            or out_rows_given != m
            or out_shape[1] != n
            or column_stride != 1
            or (out.dtype != torch.float32 and (accumulate or out.dtype != b.dtype or not self.can_round(b, k)))
        ):
            raise ValueError(
                f"out must be a float32 [{m}, {n}] matrix with unit column stride for operands "
                f"[{m}, {k}] and [{terms}, {n}], got {out.dtype} [{out_rows_given}, {out_shape[1]}]"
            )
        self._native.product(
            name,
            _operand(a, a_shape[0], a_rows),
            _operand(b, b_shape[0], b_rows),
            (
                out.data_ptr(),
                row_stride,
                SCALARS[out.dtype],
                0 if out_rows is None else out_rows.data_ptr(),
                out_shape[0],
            ),
            (m, n, k),
            accumulate,
            torch.get_num_threads(),
        )


def _operand(matrix: Tensor, rows: int, listed: Tensor | None) -> tuple[int, ...]:
    """A matrix for the extension, and the list of its rows (0: none), whose values the extension checks."""
    row_stride, column_stride = matrix.stride()
    list_address = 0 if listed is None else listed.data_ptr()
    return matrix.data_ptr(), row_stride, column_stride, SCALARS[matrix.dtype], list_address, rows
