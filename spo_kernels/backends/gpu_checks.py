"""What the GPU kernels take for granted, checked before a pointer reaches them."""

import torch
from torch import Tensor

from spo_kernels.backends.contract import mass_blocks


def check_tile(
    tile: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    vectors: dict[str, Tensor | None],
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> None:
    """Rows of one of `dtypes` without gaps between columns, a label and one value of each vector per row.

    Raises:
        ValueError: Something else; the message names it.
    """
    if tile.dtype not in dtypes or tile.ndim != 2 or (tile.shape[1] > 1 and tile.stride(1) != 1):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"expected a {names} matrix with contiguous rows, got {tile.dtype} {list(tile.shape)}")
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


def check_out(tile: Tensor, out: Tensor | None) -> None:
    """The tile's shape and device, rows without gaps."""
    if out is not None and (out.shape != tile.shape or out.device != tile.device or out.stride(-1) != 1):
        raise ValueError(f"out: expected {list(tile.shape)} on {tile.device}, got {list(out.shape)} on {out.device}")


def check_masses(tile: Tensor, block_lse: Tensor | None, rescale: Tensor | None) -> None:
    """A float32 value for each block of columns, and no `rescale`."""
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
