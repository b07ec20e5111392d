"""The `cuda` backend: passes checked tensors to the kernels of `csrc/cuda` as raw device pointers."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends import cuda_extension
from spo_kernels.backends.contract import SCALARS, Backend, Tile, TokenGrads, TokenStats
from spo_kernels.backends.gpu_checks import check_masses, check_out, check_rows, check_tile
from spo_kernels.backends.pair_form import PairCall, PairForm, PairTensors
from spo_kernels.backends.products import VendorProducts
from spo_kernels.backends.registration import Registration

Matrix = tuple[int, int, int]
Queue = tuple[int, int]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor) -> Matrix:
    return tensor.data_ptr(), tensor.stride(0), SCALARS[tensor.dtype]


def _checked_target(tile: Tile) -> Tensor:
    """Where the kernel is to write: the products, their like, or a half-precision operand for float32 products."""
    check_out(tile)
    given, wanted = tile.products.dtype, tile.written.dtype
    if wanted != given and (given != torch.float32 or wanted not in SCALARS):
        raise ValueError(f"out: a {given} tile cannot be written as {wanted}")
    return tile.written


class CudaBackend(Backend):
    """See `Backend` for the meaning of each argument; rows may be strided, columns not.

    Tiles may also be bfloat16 or float16, with arithmetic and statistics in float32.
    """

    name = "cuda"
    pair_loss_available = True

    def __init__(self, native: Any) -> None:
        self._native = native
        self.products = VendorProducts()

    def _guard(self, tensor: Tensor) -> AbstractContextManager[Any]:
        """Makes the tensor's device current: the kernels' own runtime sets it too, and leaves it set."""
        if not tensor.is_cuda:
            raise ValueError(f"the cuda backend takes tensors on an NVIDIA GPU, got one on {tensor.device}")
        return torch.cuda.device_of(tensor)

    def _queue(self, tensor: Tensor) -> Queue:
        """The device's number and the caller's stream on it."""
        return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream

    def _tile(self, tile: Tile, target: Tensor) -> dict[str, Any]:
        """The arguments that both passes take."""
        rows, columns = tile.products.shape
        return {
            "products": _matrix(tile.products),
            "out": _matrix(target),
            "rows": rows,
            "columns": columns,
            "labels": tile.labels.data_ptr(),
            "transform": (_address(tile.bias), tile.transform.scale, tile.transform.softcap or 0.0),
            "queue": self._queue(tile.products),
        }

    def tile_stats(
        self, tile: Tile, stats: TokenStats, *, rescale: Tensor | None = None, block_lse: Tensor | None = None
    ) -> None:
        """See `Backend`."""
        check_tile(tile, {**vars(stats), "rescale": rescale}, tuple(SCALARS))
        check_masses(tile.products, block_lse, rescale)
        # without `rescale` nothing is written
        target = tile.products if rescale is None else _checked_target(tile)
        with self._guard(tile.products):
            self._native.tile_stats(
                **self._tile(tile, target),
                max=_address(stats.max),
                sum=_address(stats.sum),
                label_logit=_address(stats.label_logit),
                shifted_sum=_address(stats.shifted_sum),
                square_sum=_address(stats.square_sum),
                rescale=_address(rescale),
                block_lse=_address(block_lse),
                block_lse_stride=0 if block_lse is None else block_lse.stride(0),
            )

    def tile_grad(self, tile: Tile, grads: TokenGrads) -> None:
        """See `Backend`."""
        check_tile(tile, vars(grads), tuple(SCALARS))
        target = _checked_target(tile)
        with self._guard(tile.products):
            self._native.tile_grad(
                **self._tile(tile, target),
                lse=_address(grads.lse_value),
                grad_logp=_address(grads.logp),
                grad_lse=_address(grads.lse),
                grad_entropy=_address(grads.entropy),
                entropy=_address(grads.entropy_value),
                grad_log_sum_p2=_address(grads.log_sum_p2),
                log_sum_p2=_address(grads.log_sum_p2_value),
                lse_rest=_address(grads.lse_rest),
            )

    def scale_rows(self, matrix: Tensor, factors: Tensor) -> None:
        """See `Backend`."""
        check_rows("matrix", matrix, {"factors": factors}, tuple(SCALARS))
        with self._guard(matrix):
            self._native.scale_rows(
                _matrix(matrix),
                rows=matrix.shape[0],
                columns=matrix.shape[1],
                factors=factors.data_ptr(),
                queue=self._queue(matrix),
            )

    def pair_loss(self, pairs: PairTensors, form: PairForm, factor: float) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        call = PairCall.of(pairs, form)
        with self._guard(pairs.logp):
            self._native.pair_loss(**call.arguments, factor=factor, queue=self._queue(pairs.logp))
        return call.summary, call.coefficients


REGISTRATION = Registration.of_module(
    CudaBackend.name, ("cuda",), cuda_extension.load, cuda_extension.why_not, CudaBackend
)
