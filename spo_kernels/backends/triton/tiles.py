"""The `triton` tile backend: hands checked tensors to the kernels of `spo_kernels.backends.triton`. Imports triton."""

import torch
from torch import Tensor

from spo_kernels.backends.contract import LogitTransform, TokenGrads, TokenStats
from spo_kernels.backends.gpu_checks import check_masses, check_out, check_tile
from spo_kernels.backends.products import HALF_DTYPES
from spo_kernels.backends.triton import scale_rows as rows_kernel
from spo_kernels.backends.triton import tile_grad as grad_kernel
from spo_kernels.backends.triton import tile_stats as stats_kernel

TEMPORARIES = 0.0


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
    check_tile(tile, bias, labels, {**vars(stats), "rescale": rescale})
    check_out(tile, out)
    check_masses(tile, block_lse, rescale)
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
    check_tile(tile, bias, labels, vars(grads))
    check_out(tile, out)
    grad_kernel.tile_grad(tile, bias, labels, transform, grads, out)


def scale_rows(matrix: Tensor, factors: Tensor) -> None:
    """See `TileBackend.scale_rows`."""
    labels = factors.new_empty(matrix.shape[0], dtype=torch.int64)
    check_tile(matrix, None, labels, {"factors": factors}, (torch.float32, *HALF_DTYPES))
    rows_kernel.scale_rows(matrix, factors)
