"""Budgets: how large tiles and blocks may be within `workspace_bytes`.

Only this file and `kept_space.py`, for tiles that are kept, compute bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from spo_kernels.backends.contract import MASS_BLOCK, Backend
from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.engine.head_slices import HeadSlices

# where the call does not say; larger tiles make no product faster
_TILE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
# below this many columns a product spends its time on reading the token tile again
_MIN_COLUMNS = 512
_MAX_ROWS = {"cpu": 2048, "cuda": 4096}
# On a GPU wider tiles make a product no faster, and 8192 columns are a block of the Triton kernels: where they write
# an operand, they read a wider row twice (10 bytes a cell, not 6).
_BLOCK_COLUMNS = {"cuda": 8192}
# A GPU's tile of few tokens may be wider, until it has so many cells: each slice of the vocabulary costs its launches.
# Fewer where exponentials of rows are written, which are read twice then: at H = 4096 a product of 2^22 cells takes
# 50 us, as long as the launches.
_CELLS = {"cuda": 1 << 25}
_EXPONENTIAL_CELLS = {"cuda": 1 << 22}
# elements between rows of a tile: a multiple of these on a GPU, whose products and kernels take 16 bytes at a time
_APART = {"cuda": 64, "cpu": 1}
# Columns that a sparse backward keeps or leaves out together. CPU: the mass blocks themselves. GPU: a launch's
# latency is that of about 1024 columns of a few hundred tokens.
_BLOCK_WIDTH = {"cpu": MASS_BLOCK, "cuda": 8 * MASS_BLOCK}
# one byte per (token, block) pair; wider blocks where there would be more
_MAX_CODE_BYTES = 32 << 20


def spans(total: int, step: int) -> Iterator[slice]:
    """0..total in consecutive slices of at most `step`."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def block_columns(device: str, vocab: int, rows: int, *, exponentials: bool) -> int:
    """Most columns of a tile where larger ones make nothing faster; `exponentials` where such are written."""
    cells = (_EXPONENTIAL_CELLS if exponentials else _CELLS).get(device, 0)
    return min(vocab, max(_BLOCK_COLUMNS.get(device, vocab), cells // max(rows, 1)))


def row_stride(columns: int, device: str) -> int:
    """Elements from a row of a tile to the next."""
    apart = _APART.get(device, _APART["cuda"])
    return -(-columns // apart) * apart


def tile_of(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """A tile at the beginning of a flat buffer."""
    stride = row_stride(columns, buffer.device.type)
    tile = buffer[: rows * stride].view(rows, stride)
    return tile if stride == columns else tile[:, :columns]


def tile_budget(workspace_bytes: int | None, device: str) -> int:
    """The bytes that tiles which are not kept may take: what the call says, or the device's default."""
    return workspace_bytes or _TILE_BYTES.get(device, _TILE_BYTES["cuda"])


@dataclass(frozen=True)
class TileShape:
    """Rows and columns of a tile, and the bytes of all that is beside inputs, gradients and per-token values."""

    rows: int
    columns: int
    bytes: int

    def of_blocks(self, width: int) -> TileShape:
        """Tiles one block wide, which may be more than this one's columns, with no more cells."""
        return TileShape(max(1, min(self.rows, self.rows * self.columns // width)), width, self.bytes)


def plan_tiles(
    tokens: int,
    hidden: Tensor,
    head: HeadSlices,
    backend: Backend,
    workspace_bytes: int | None,
    *,
    exponentials: bool,
    models: int = 1,
    temporaries: float | None = None,
) -> TileShape:
    """The largest tile whose temporaries fit the budget, of which each of `models` heads in work has its share.

    `exponentials`: whether the pass over a tile writes those of whole rows, as `forward` does for a gradient.
    Per cell: see `Backend.cell_bytes`. Per row: the gathered token, its accumulated sum and what the product packs.
    Per column: the weight row where it is copied, and its accumulated gradient or a label's weight row; where rows are
    streamed a second gradient, on its way, and as many columns as the most tokens allow, which all processes know.

    Raises:
        ValueError: Not even one cell fits.
    """
    vocab, width = head.widest, head.width
    wide = accumulator_dtype(hidden.dtype).itemsize
    narrow = backend.products.operand_dtype(hidden).itemsize
    cell = backend.cell_bytes(hidden, temporaries)
    device = hidden.device.type
    row = width * (wide + narrow) + backend.products.row_bytes + (row_stride(vocab, device) - vocab) * cell
    column = width * ((2 if head.streams else 1) * wide + head.copied_bytes(narrow))
    budget = tile_budget(workspace_bytes, device) // models
    if cell + row + column > budget:
        raise ValueError(
            f"workspace_bytes = {workspace_bytes} is too small: one token and one vocabulary column of "
            f"hidden size {width} need {models * (cell + row + column)} bytes"
        )
    most = _MAX_ROWS.get(device, _MAX_ROWS["cuda"])
    rows = max(1, most if head.streams else min(tokens, most))
    # where so many columns take more than half of the budget by themselves, rows would get what is left: one, or few
    least = min(vocab, _MIN_COLUMNS, max(1, budget // (2 * column)))
    while rows > 1 and (budget - rows * row) // (rows * cell + column) < least:
        rows = (rows + 1) // 2
    writes = backend.products.tile_dtype(hidden) != accumulator_dtype(hidden.dtype)
    capped = writes or workspace_bytes is None
    widest = block_columns(device, vocab, rows, exponentials=exponentials) if capped else vocab
    columns = whole_blocks(max(1, min(widest, (budget - rows * row) // (rows * cell + column))), vocab)
    return TileShape(rows, columns, models * (rows * row + columns * (rows * cell + column)))


def plan_score_tiles(
    tokens: int, classes: int, like: Tensor, head: HeadSlices, backend: Backend, workspace_bytes: int | None
) -> TileShape:
    """Tiles beside which a column holds a row of the head and one of the sum M, and a row two of hidden states.

    All in the dtype of `like`; see `extras/nthr.py`.
    """
    states = 2 * head.width * like.dtype.itemsize
    budget = tile_budget(workspace_bytes, like.device.type)
    columns = max(1, min(classes, budget // 4 // states))
    row = columns * backend.cell_bytes(like) + states + backend.products.row_bytes
    rows = max(1, min(tokens, (budget - columns * states) // row))
    return TileShape(rows, columns, rows * row + columns * states)


def whole_blocks(columns: int, vocab: int) -> int:
    """Columns rounded down to whole mass blocks, where there are several and not all."""
    return columns - columns % MASS_BLOCK if MASS_BLOCK < columns < vocab else columns


def block_width(tokens: int, vocab: int, device: str) -> int:
    """Columns of a block of the sparse backward: a multiple of MASS_BLOCK."""
    width = _BLOCK_WIDTH.get(device, _BLOCK_WIDTH["cuda"])
    while tokens * -(-vocab // width) > _MAX_CODE_BYTES and width < vocab:
        width *= 2
    return width
