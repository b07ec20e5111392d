"""The `triton` backend: hands checked tensors to the kernels of this folder. Imports triton."""

import torch
from torch import Tensor

from spo_kernels.backends.contract import Backend, Tile, TokenGrads, TokenStats
from spo_kernels.backends.gpu_checks import check_masses, check_out, check_rows, check_tile
from spo_kernels.backends.pair_form import PairForm, PairTensors
from spo_kernels.backends.products import HALF_DTYPES, VendorProducts
from spo_kernels.backends.triton import pair_loss as pair_kernel
from spo_kernels.backends.triton import scale_rows as rows_kernel
from spo_kernels.backends.triton import tile_grad as grad_kernel
from spo_kernels.backends.triton import tile_stats as stats_kernel


class TritonBackend(Backend):
    """See `Backend` for the meaning of each argument; rows may be strided, columns not."""

    name = "triton"
    pair_loss_available = True

    def __init__(self) -> None:
        self.products = VendorProducts()

    def tile_stats(
        self, tile: Tile, stats: TokenStats, *, rescale: Tensor | None = None, block_lse: Tensor | None = None
    ) -> None:
        """See `Backend`."""
        check_tile(tile, {**vars(stats), "rescale": rescale})
        check_out(tile)
        check_masses(tile.products, block_lse, rescale)
        stats_kernel.tile_stats(tile, stats, rescale=rescale, block_lse=block_lse)

    def tile_grad(self, tile: Tile, grads: TokenGrads) -> None:
        """See `Backend`."""
        check_tile(tile, vars(grads))
        check_out(tile)
        grad_kernel.tile_grad(tile, grads)

    def scale_rows(self, matrix: Tensor, factors: Tensor) -> None:
        """See `Backend`."""
        check_rows("matrix", matrix, {"factors": factors}, (torch.float32, *HALF_DTYPES))
        rows_kernel.scale_rows(matrix, factors)

    def pair_loss(self, pairs: PairTensors, form: PairForm, factor: float) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        return pair_kernel.pair_loss(pairs, form, factor)
