"""The `cpp` backend: passes checked tensors to the C++ kernels of `csrc/cpu` as raw pointers."""

from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends import cpp_extension
from spo_kernels.backends.contract import Backend, Tile, TokenGrads, TokenStats, mass_blocks
from spo_kernels.backends.cpp_products import NativeProducts
from spo_kernels.backends.registration import BackendStatus, Registration


def _pointer(tensor: Tensor | None, length: int, dtype: torch.dtype = torch.float32) -> int:
    """The address of a contiguous CPU vector of `length` elements; 0 for None."""
    if tensor is None:
        return 0
    if tensor.dtype != dtype or tensor.shape != (length,) or not tensor.is_contiguous() or tensor.is_cuda:
        raise ValueError(
            f"expected a contiguous CPU {dtype} vector of {length} elements, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    return tensor.data_ptr()


def _matrix(tensor: Tensor) -> tuple[int, int, bool]:
    return tensor.data_ptr(), tensor.stride(0), tensor.dtype == torch.bfloat16


def _check_matrix(name: str, matrix: Tensor, shape: torch.Size, *dtypes: torch.dtype) -> None:
    if matrix.dtype not in dtypes or matrix.ndim != 2 or matrix.is_cuda or matrix.shape != shape:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: expected a CPU {names} matrix {list(shape)}, "
            f"got {matrix.dtype} {list(matrix.shape)} on {matrix.device}"
        )
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise ValueError(f"{name}: expected contiguous rows, got strides {matrix.stride()}")


def _check_tile(tile: Tile) -> None:
    _check_matrix("products", tile.products, tile.products.shape, torch.float32)
    if tile.out is not None:
        _check_matrix("out", tile.out, tile.products.shape, torch.float32, torch.bfloat16)


def _mass_pointer(block_lse: Tensor | None, rows: int, columns: int, rescale: Tensor | None) -> tuple[int, int]:
    """Address and row stride of the block masses; zeros for None."""
    if block_lse is None:
        return 0, 0
    shape = (rows, mass_blocks(columns))
    if rescale is not None:
        raise ValueError("block_lse cannot be had together with rescale")
    if block_lse.dtype != torch.float32 or block_lse.shape != shape or block_lse.stride(1) != 1 or block_lse.is_cuda:
        raise ValueError(
            f"block_lse: expected a CPU float32 {list(shape)} matrix with contiguous rows, "
            f"got {block_lse.dtype} {list(block_lse.shape)} on {block_lse.device}"
        )
    return block_lse.data_ptr(), block_lse.stride(0)


class CppBackend(Backend):
    """See `Backend` for the meaning of each argument; rows may be strided, columns not."""

    name = "cpp"

    def __init__(self, native: Any) -> None:
        self._native = native
        self.products = NativeProducts(native)

    def tile_stats(
        self, tile: Tile, stats: TokenStats, *, rescale: Tensor | None = None, block_lse: Tensor | None = None
    ) -> None:
        """See `Backend`."""
        _check_tile(tile)
        rows, columns = tile.products.shape
        masses, masses_stride = _mass_pointer(block_lse, rows, columns, rescale)
        self._native.tile_stats(
            tile=_matrix(tile.products),
            out=_matrix(tile.written),
            rows=rows,
            columns=columns,
            bias=_pointer(tile.bias, columns),
            labels=_pointer(tile.labels, rows, torch.int64),
            scale=tile.transform.scale,
            softcap=tile.transform.softcap or 0.0,
            max=_pointer(stats.max, rows),
            sum=_pointer(stats.sum, rows),
            label_logit=_pointer(stats.label_logit, rows),
            shifted_sum=_pointer(stats.shifted_sum, rows),
            square_sum=_pointer(stats.square_sum, rows),
            rescale=_pointer(rescale, rows),
            block_lse=masses,
            block_lse_stride=masses_stride,
            threads=torch.get_num_threads(),
        )

    def tile_grad(self, tile: Tile, grads: TokenGrads) -> None:
        """See `Backend`."""
        _check_tile(tile)
        rows, columns = tile.products.shape
        self._native.tile_grad(
            tile=_matrix(tile.products),
            out=_matrix(tile.written),
            rows=rows,
            columns=columns,
            bias=_pointer(tile.bias, columns),
            labels=_pointer(tile.labels, rows, torch.int64),
            scale=tile.transform.scale,
            softcap=tile.transform.softcap or 0.0,
            lse=_pointer(grads.lse_value, rows),
            grad_logp=_pointer(grads.logp, rows),
            grad_lse=_pointer(grads.lse, rows),
            grad_entropy=_pointer(grads.entropy, rows),
            entropy=_pointer(grads.entropy_value, rows),
            grad_log_sum_p2=_pointer(grads.log_sum_p2, rows),
            log_sum_p2=_pointer(grads.log_sum_p2_value, rows),
            threads=torch.get_num_threads(),
        )

    def scale_rows(self, matrix: Tensor, factors: Tensor) -> None:
        """See `Backend`."""
        _check_matrix("matrix", matrix, matrix.shape, torch.float32, torch.bfloat16)
        self._native.scale_rows(
            _matrix(matrix),
            rows=matrix.shape[0],
            columns=matrix.shape[1],
            factors=_pointer(factors, matrix.shape[0]),
            threads=torch.get_num_threads(),
        )


def _status() -> BackendStatus:
    native, detail = cpp_extension.load()
    return BackendStatus(native is not None, detail)


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {device}"
    if dtype == torch.float64:
        return "it has no float64 tiles; use backend='torch'"
    native, detail = cpp_extension.load()
    return detail if native is None else None


def _load() -> CppBackend:
    native, detail = cpp_extension.load()
    if native is None:
        raise RuntimeError(detail)
    return CppBackend(native)


REGISTRATION = Registration(CppBackend.name, ("cpu",), _status, _why_not, _load)
