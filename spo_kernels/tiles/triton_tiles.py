"""The `triton` tile backend: hands checked tensors to the kernels of `spo_kernels.kernels`. Imports triton."""

import torch
from torch import Tensor

from spo_kernels.kernels import scale_rows as rows_kernel
from spo_kernels.kernels import tile_grad as grad_kernel
from spo_kernels.kernels import tile_stats as stats_kernel
from spo_kernels.tiles.spec import LogitTransform, TokenGrads, TokenStats, mass_blocks

TEMPORARIES = 0.0


def _check(tile: Tensor, bias: Tensor | None, labels: Tensor, vectors: dict[str, Tensor | None]) -> None:
    """What the kernels take for granted: float32 rows without gaps between columns, one value per row."""
    if tile.dtype != torch.float32 or tile.ndim != 2 or (tile.shape[1] > 1 and tile.stride(1) != 1):
        raise ValueError(f"expected a float32 matrix with contiguous rows, got {tile.dtype} {list(tile.shape)}")
    rows, columns = tile.shape
    expected = [("labels", labels, rows, torch.int64), ("bias", bias, columns, torch.float32)]
    expected += [(name, vector, rows, torch.float32) for name, vector in vectors.items()]
    for name, vector, length, dtype in expected:
        if vector is None:
            continue
        if vector.shape != (length,) or vector.dtype != dtype or not vector.is_contiguous():
            raise ValueError(
                f"{name}: expected a contiguous {dtype} vector of {length} elements, "
                f"got {vector.dtype} {list(vector.shape)}"
            )
        if vector.device != tile.device:
            raise ValueError(f"{name} is on {vector.device}, but the tile is on {tile.device}")


def _check_out(tile: Tensor, out: Tensor | None) -> None:
    if out is not None and (out.shape != tile.shape or out.device != tile.device or out.stride(-1) != 1):
        raise ValueError(f"out: expected {list(tile.shape)} on {tile.device}, got {list(out.shape)} on {out.device}")


def _check_masses(tile: Tensor, block_lse: Tensor | None, rescale: Tensor | None) -> None:
    if block_lse is None:
        return
    shape = (tile.shape[0], mass_blocks(tile.shape[1]))
    if rescale is not None:
        raise ValueError("block_lse cannot be had together with rescale")
    if block_lse.dtype != torch.float32 or block_lse.shape != shape or block_lse.stride(1) != 1:
        raise ValueError(
            f"block_lse: expected a float32 {list(shape)} matrix with contiguous rows, "
            f"got {block_lse.dtype} {list(block_lse.shape)}"
        )
    if block_lse.device != tile.device:
        raise ValueError(f"block_lse is on {block_lse.device}, but the tile is on {tile.device}")


def tile_stats(
    tile: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    transform: LogitTransform,
    stats: TokenStats,
    rescale: Tensor | None,
    out: Tensor | None = None,
    block_lse: Tensor | None = None,
) -> None:
    """See `TileBackend.tile_stats`."""
    _check(tile, bias, labels, {**vars(stats), "rescale": rescale})
    _check_out(tile, out)
    _check_masses(tile, block_lse, rescale)
    stats_kernel.tile_stats(tile, bias, labels, transform, stats, rescale, out, block_lse)


def tile_grad(
    tile: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    transform: LogitTransform,
    grads: TokenGrads,
    out: Tensor | None = None,
) -> None:
    """See `TileBackend.tile_grad`."""
    _check(tile, bias, labels, vars(grads))
    _check_out(tile, out)
    grad_kernel.tile_grad(tile, bias, labels, transform, grads, out)


def scale_rows(matrix: Tensor, factors: Tensor) -> None:
    """See `TileBackend.scale_rows`."""
    _check(matrix, None, factors.new_empty(matrix.shape[0], dtype=torch.int64), {"factors": factors})
    rows_kernel.scale_rows(matrix, factors)
