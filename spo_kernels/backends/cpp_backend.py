"""The `cpp` backend: passes checked tensors to the C++ kernels of `csrc/cpu` as raw pointers."""

from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends import cpp_extension
from spo_kernels.backends.contract import SCALARS, Backend, Scalar, Tile, TokenGrads, TokenStats, mass_blocks
from spo_kernels.backends.cpp_products import NativeProducts
from spo_kernels.backends.pair_form import PairCall, PairForm, PairTensors
from spo_kernels.backends.registration import NO_FLOAT64, Registration


def _addresses(length: int, dtype: torch.dtype, *vectors: Tensor | None) -> list[int]:
    """The addresses of contiguous CPU vectors of `length` elements; 0 for None."""
    found = []
    for vector in vectors:
        if vector is None:
            found.append(0)
            continue
        # `dtype`, `numel` and the flags are the cheapest questions that a tensor answers, 50 ns each
        if vector.dtype != dtype or vector.numel() != length or not (vector.is_cpu and vector.is_contiguous()):
            raise ValueError(
                f"expected a contiguous CPU {dtype} vector of {length} elements, "
                f"got {vector.dtype} {list(vector.shape)} on {vector.device}"
            )
        found.append(vector.data_ptr())
    return found


def _row_stride(name: str, matrix: Tensor, shape: torch.Size, dtypes: tuple[torch.dtype, ...]) -> int:
    """The row stride of a CPU matrix of that shape and one of those dtypes, whose rows have no gaps."""
    if matrix.dtype not in dtypes or matrix.shape != shape or matrix.ndim != 2 or not matrix.is_cpu:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: expected a CPU {names} matrix {list(shape)}, "
            f"got {matrix.dtype} {list(matrix.shape)} on {matrix.device}"
        )
    row_stride, column_stride = matrix.stride()
    if column_stride != 1 and shape[1] > 1:
        raise ValueError(f"{name}: expected contiguous rows, got strides {matrix.stride()}")
    return row_stride


def _masses(block_lse: Tensor | None, rows: int, columns: int, rescale: Tensor | None) -> tuple[int, int]:
    """Address and row stride of the block masses; zeros for None."""
    if block_lse is None:
        return 0, 0
    if rescale is not None:
        raise ValueError("block_lse cannot be had together with rescale")
    shape = torch.Size((rows, mass_blocks(columns)))
    stride = _row_stride("block_lse", block_lse, shape, (torch.float32,))
    return block_lse.data_ptr(), stride


def _numbers(tile: Tile) -> tuple[tuple[int, ...], tuple[int, float, float]]:
    """A tile and its transform as the extension takes them."""
    products, out, transform = tile.products, tile.out, tile.transform
    shape = products.shape
    stride = out_stride = _row_stride("products", products, shape, (torch.float32,))
    address = out_address = products.data_ptr()
    scalar: int = _FLOAT32
    if out is not None:
        out_stride = _row_stride("out", out, shape, _WRITTEN)
        out_address, scalar = out.data_ptr(), SCALARS[out.dtype]
    rows, columns = shape
    (labels,) = _addresses(rows, torch.int64, tile.labels)
    bias = 0 if tile.bias is None else _addresses(columns, torch.float32, tile.bias)[0]
    numbers = (address, stride, out_address, out_stride, scalar, rows, columns, labels)
    return numbers, (bias, transform.scale, transform.softcap or 0.0)


_FLOAT32 = Scalar.FLOAT32
# what a pass can write
_WRITTEN = (torch.float32, torch.bfloat16)


class CppBackend(Backend):
    """See `Backend` for the meaning of each argument; rows may be strided, columns not."""

    name = "cpp"
    pair_loss_available = True

    def __init__(self, native: Any) -> None:
        self._native = native
        self.products = NativeProducts(native)

    def tile_stats(
        self, tile: Tile, stats: TokenStats, *, rescale: Tensor | None = None, block_lse: Tensor | None = None
    ) -> None:
        """See `Backend`."""
        numbers, transform = _numbers(tile)
        addresses = _addresses(
            numbers[5],
            torch.float32,
            stats.max,
            stats.sum,
            stats.label_logit,
            stats.shifted_sum,
            stats.square_sum,
            rescale,
        )
        addresses += _masses(block_lse, numbers[5], numbers[6], rescale)
        self._native.tile_stats(numbers, transform, addresses, torch.get_num_threads())

    def tile_grad(self, tile: Tile, grads: TokenGrads) -> None:
        """See `Backend`."""
        numbers, transform = _numbers(tile)
        addresses = _addresses(
            numbers[5],
            torch.float32,
            grads.lse_value,
            grads.logp,
            grads.lse,
            grads.entropy,
            grads.entropy_value,
            grads.log_sum_p2,
            grads.log_sum_p2_value,
            grads.lse_rest,
        )
        self._native.tile_grad(numbers, transform, addresses, torch.get_num_threads())

    def scale_rows(self, matrix: Tensor, factors: Tensor) -> None:
        """See `Backend`."""
        stride = _row_stride("matrix", matrix, matrix.shape, _WRITTEN)
        rows, columns = matrix.shape
        (found,) = _addresses(rows, torch.float32, factors)
        numbers = (matrix.data_ptr(), stride, SCALARS[matrix.dtype], rows, columns)
        self._native.scale_rows(numbers, found, torch.get_num_threads())

    def pair_loss(self, pairs: PairTensors, form: PairForm, factor: float) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        if not pairs.logp.is_cpu:
            raise ValueError(f"the cpp backend takes tensors on the CPU, got one on {pairs.logp.device}")
        call = PairCall.of(pairs, form)
        self._native.pair_loss(**call.arguments, factor=factor)
        return call.summary, call.coefficients


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {device}"
    if dtype == torch.float64:
        return NO_FLOAT64
    native, detail = cpp_extension.load()
    return detail if native is None else None


REGISTRATION = Registration.of_module(CppBackend.name, ("cpu",), cpp_extension.load, _why_not, CppBackend)
