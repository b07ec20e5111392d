"""What the GPU kernels take for granted, checked before a pointer reaches them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from spo_kernels.backends.contract import Tile, mass_blocks


def check_tile(
    tile: Tile, vectors: Mapping[str, Tensor | None], dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> None:
    """Products of one of `dtypes`, a label and one float32 value of each vector per row, a bias per column.

    Raises:
        ValueError: Something else; the message names it.
    """
    check_rows("products", tile.products, vectors, dtypes)
    rows, columns = tile.products.shape
    _check_vector("labels", tile.labels, rows, torch.int64, tile.products)
    if tile.bias is not None:
        _check_vector("bias", tile.bias, columns, torch.float32, tile.products)


def check_rows(
    name: str, matrix: Tensor, vectors: Mapping[str, Tensor | None], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Rows of one of `dtypes` without gaps between columns, and one float32 value of each vector per row.

    Raises:
        ValueError: Something else; the message names it.
    """
    if matrix.dtype not in dtypes or matrix.ndim != 2 or (matrix.shape[1] > 1 and matrix.stride(1) != 1):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: expected a {names} matrix with contiguous rows, got {matrix.dtype} {list(matrix.shape)}"
        )
    for vector_name, vector in vectors.items():
        if vector is not None:
            _check_vector(vector_name, vector, matrix.shape[0], torch.float32, matrix)


def _check_vector(name: str, vector: Tensor, length: int, dtype: torch.dtype, matrix: Tensor) -> None:
    if vector.shape != (length,) or vector.dtype != dtype or not vector.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous {dtype} vector of {length} elements, "
            f"got {vector.dtype} {list(vector.shape)}"
        )
    if vector.device != matrix.device:
        raise ValueError(f"{name} is on {vector.device}, but the tile is on {matrix.device}")


def check_out(tile: Tile) -> None:
    """The products' shape and device, rows without gaps.

    Raises:
        ValueError: Something else.
    """
    out, products = tile.out, tile.products
    if out is not None and (out.shape != products.shape or out.device != products.device or out.stride(-1) != 1):
        raise ValueError(
            f"out: expected {list(products.shape)} on {products.device}, got {list(out.shape)} on {out.device}"
        )


def check_masses(products: Tensor, block_lse: Tensor | None, rescale: Tensor | None) -> None:
    """A float32 value for each block of columns, and no `rescale`.

    Raises:
        ValueError: Something else.
    """
    if block_lse is None:
        return
    shape = (products.shape[0], mass_blocks(products.shape[1]))
    if rescale is not None:
        raise ValueError("block_lse cannot be had together with rescale")
    if block_lse.dtype != torch.float32 or block_lse.shape != shape or block_lse.stride(1) != 1:
        raise ValueError(
            f"block_lse: expected a float32 {list(shape)} matrix with contiguous rows, "
            f"got {block_lse.dtype} {list(block_lse.shape)}"
        )
    if block_lse.device != products.device:
        raise ValueError(f"block_lse is on {block_lse.device}, but the tile is on {products.device}")
