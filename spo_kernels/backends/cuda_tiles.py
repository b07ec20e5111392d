"""The `cuda` tile backend: passes checked tensors to the kernels of `csrc/cuda` as raw device pointers."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends.contract import LogitTransform, TokenGrads, TokenStats
from spo_kernels.backends.gpu_checks import check_masses, check_out, check_tile
from spo_kernels.backends.pair_form import PairForm, pair_outputs

# the numbers of csrc/cuda/tiles.h
_SCALARS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PENALTIES = {"none": 0, "nll": 1, "hinge": 2}

Matrix = tuple[int, int, int]
Queue = tuple[int, int]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor) -> Matrix:
    return tensor.data_ptr(), tensor.stride(0), _SCALARS[tensor.dtype]


def _check_target(tile: Tensor, out: Tensor | None) -> Tensor:
    """Where the kernel is to write: the tile, its like, or a half-precision operand for a float32 tile."""
    check_out(tile, out)
    if out is None:
        return tile
    if out.dtype != tile.dtype and (tile.dtype != torch.float32 or out.dtype not in _SCALARS):
        raise ValueError(f"out: a {tile.dtype} tile cannot be written as {out.dtype}")
    return out


def _check_pairs(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor
) -> None:
    if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != like.device):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: expected {names} {list(shape)} on {like.device}, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )


class CudaTiles:
    """See `TileBackend` for the meaning of each argument; rows may be strided, columns not.

    Tiles may also be bfloat16 or float16, with arithmetic and statistics in float32.
    """

    TEMPORARIES = 0.0

    def __init__(self, native: Any) -> None:
        self._native = native

    def _guard(self, tensor: Tensor) -> AbstractContextManager[Any]:
        """Makes the tensor's device current: the kernels' own runtime sets it too, and leaves it set."""
        if not tensor.is_cuda:
            raise ValueError(f"the cuda backend takes tensors on an NVIDIA GPU, got one on {tensor.device}")
        return torch.cuda.device_of(tensor)

    def _queue(self, tensor: Tensor) -> Queue:
        """The device's number and the caller's stream on it."""
        return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream

    def _tile(
        self, tile: Tensor, target: Tensor, bias: Tensor | None, labels: Tensor, transform: LogitTransform
    ) -> dict[str, Any]:
        """The arguments that both passes take."""
        return {
            "products": _matrix(tile),
            "out": _matrix(target),
            "rows": tile.shape[0],
            "columns": tile.shape[1],
            "labels": labels.data_ptr(),
            "transform": (_address(bias), transform.scale, transform.softcap or 0.0),
            "queue": self._queue(tile),
        }

    def tile_stats(
        self,
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
        check_tile(tile, bias, labels, {**vars(stats), "rescale": rescale}, tuple(_SCALARS))
        target = _check_target(tile, out if rescale is not None else None)
        check_masses(tile, block_lse, rescale)
        with self._guard(tile):
            self._native.tile_stats(
                **self._tile(tile, target, bias, labels, transform),
                max=_address(stats.max),
                sum=_address(stats.sum),
                label_logit=_address(stats.label_logit),
                shifted_sum=_address(stats.shifted_sum),
                square_sum=_address(stats.square_sum),
                rescale=_address(rescale),
                block_lse=_address(block_lse),
                block_lse_stride=0 if block_lse is None else block_lse.stride(0),
            )

    def tile_grad(
        self,
        tile: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: LogitTransform,
        grads: TokenGrads,
        out: Tensor | None = None,
    ) -> None:
        """See `TileBackend.tile_grad`."""
        check_tile(tile, bias, labels, vars(grads), tuple(_SCALARS))
        target = _check_target(tile, out)
        with self._guard(tile):
            self._native.tile_grad(
                **self._tile(tile, target, bias, labels, transform),
                lse=_address(grads.lse_value),
                grad_logp=_address(grads.logp),
                grad_lse=_address(grads.lse),
                grad_entropy=_address(grads.entropy),
                entropy=_address(grads.entropy_value),
                grad_log_sum_p2=_address(grads.log_sum_p2),
                log_sum_p2=_address(grads.log_sum_p2_value),
            )

    def scale_rows(self, matrix: Tensor, factors: Tensor) -> None:
        """See `TileBackend.scale_rows`."""
        labels = factors.new_empty(matrix.shape[0], dtype=torch.int64)
        check_tile(matrix, None, labels, {"factors": factors}, tuple(_SCALARS))
        with self._guard(matrix):
            self._native.scale_rows(
                _matrix(matrix),
                rows=matrix.shape[0],
                columns=matrix.shape[1],
                factors=factors.data_ptr(),
                queue=self._queue(matrix),
            )

    def pair_loss(
        self,
        logp: Tensor,
        labels: Tensor,
        form: PairForm,
        *,
        cu_seqlens: Tensor | None,
        reference: Tensor | None,
        value: Tensor | None,
        ignore_index: int,
        factor: float,
    ) -> tuple[Tensor, Tensor]:
        """See `spo_kernels.backends.triton.pair_loss.pair_loss`."""
        logp, labels = logp.contiguous(), labels.contiguous()
        pairs, summary, coefficients = pair_outputs(logp, cu_seqlens)
        bounds, sums, values = (None if x is None else x.contiguous() for x in (cu_seqlens, reference, value))
        _check_pairs("logp", logp, logp.shape, (torch.float32,), logp)
        _check_pairs("labels", labels, logp.shape, (torch.int64,), logp)
        _check_pairs("cu_seqlens", bounds, (2 * pairs + 1,), (torch.int32, torch.int64), logp)
        _check_pairs("reference", sums, (2 * pairs,), (torch.float32,), logp)
        _check_pairs("value", values, (pairs,), (torch.float32,), logp)
        with self._guard(logp):
            self._native.pair_loss(
                logp=logp.data_ptr(),
                labels=labels.data_ptr(),
                bounds=_address(bounds),
                wide_bounds=bounds is not None and bounds.dtype == torch.int64,
                pairs=pairs,
                tokens=logp.numel(),
                width=logp.shape[-1] if bounds is None else 0,
                ignore_index=ignore_index,
                reference=_address(sums),
                value=_address(values) if form.value == "input" else 0,
                beta=form.beta,
                use_reference=form.use_reference,
                penalty=_PENALTIES[form.penalty],
                weight=form.weight,
                epsilon=form.epsilon,
                mean=form.mean,
                factor=factor,
                summary=summary.data_ptr(),
                coefficients=coefficients.data_ptr(),
                queue=self._queue(logp),
            )
        return summary, coefficients
