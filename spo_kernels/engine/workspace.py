"""Budgets: how large tiles, kept tiles and blocks may be within `workspace_bytes`. No other file computes bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from spo_kernels.backends.contract import MASS_BLOCK, Backend
from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.engine.head_slices import HeadSlices

DEFAULT_WORKSPACE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}

# below this many columns a product spends its time on reading the token tile again
_MIN_COLUMNS = 512
_MAX_ROWS = {"cpu": 2048, "cuda": 4096}
# on a GPU wider tiles make a product no faster, and 8192 columns are a block of the Triton kernels
_DEFAULT_COLUMNS = {"cuda": 8192}
# slices of 2048 tokens' logits, of the weight and of its gradient stay in the cache that a product left them in
_KEPT_COLUMNS = {"cpu": 1024}
# Columns that a sparse backward keeps or leaves out together. CPU: the mass blocks themselves. GPU: a launch's
# latency is that of about 1024 columns of a few hundred tokens.
_BLOCK_WIDTH = {"cpu": MASS_BLOCK, "cuda": 8 * MASS_BLOCK}
# one byte per (token, block) pair; wider blocks where there would be more
_MAX_CODE_BYTES = 32 << 20


def spans(total: int, step: int) -> Iterator[slice]:
    """0..total in consecutive slices of at most `step`."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def budget_of(workspace_bytes: int | None, device: str) -> int:
    """The bytes that a call may use for temporaries: what it says, or the device's default."""
    return workspace_bytes or DEFAULT_WORKSPACE_BYTES.get(device, DEFAULT_WORKSPACE_BYTES["cuda"])


@dataclass(frozen=True)
class TileShape:
    """Rows and columns of a tile."""

    rows: int
    columns: int

    def of_blocks(self, width: int) -> TileShape:
        """Tiles one block wide, which may be more than this one's columns, with no more cells."""
        return TileShape(max(1, min(self.rows, self.rows * self.columns // width)), width)


def plan_tiles(
    tokens: int,
    hidden: Tensor,
    head: HeadSlices,
    backend: Backend,
    workspace_bytes: int | None,
    *,
    models: int = 1,
    temporaries: float | None = None,
) -> TileShape:
    """The largest tile whose temporaries fit the budget, of which each of `models` heads in work has its share.

    Per cell: see `Backend.cell_bytes`. Per row: the gathered token, its accumulated sum and what the product packs.
    Per column: the weight row where it is copied, and its accumulated gradient or a label's weight row.

    Raises:
        ValueError: Not even one cell fits.
    """
    vocab, width = head.widest, head.width
    wide = accumulator_dtype(hidden.dtype).itemsize
    narrow = backend.products.operand_dtype(hidden).itemsize
    cell = backend.cell_bytes(hidden, temporaries)
    row = width * (wide + narrow) + backend.products.row_bytes
    column = width * (wide + head.copied_bytes(narrow))
    device = hidden.device.type
    budget = budget_of(workspace_bytes, device) // models
    if cell + row + column > budget:
        raise ValueError(
            f"workspace_bytes = {workspace_bytes} is too small: one token and one vocabulary column of "
            f"hidden size {width} need {models * (cell + row + column)} bytes"
        )
    rows = max(1, min(tokens, _MAX_ROWS.get(device, _MAX_ROWS["cuda"])))
    while rows > 1 and (budget - rows * row) // (rows * cell + column) < min(vocab, _MIN_COLUMNS):
        rows = (rows + 1) // 2
    widest = vocab if workspace_bytes else min(vocab, _DEFAULT_COLUMNS.get(device, vocab))
    columns = max(1, min(widest, (budget - rows * row) // (rows * cell + column)))
    return TileShape(rows, _whole_blocks(columns, vocab))


@dataclass(frozen=True)
class KeptSpace:
    """What rows of the whole vocabulary cost that are kept until their coefficients are known."""

    budget: int
    direct: bool  # the weight's gradient has the accumulator's dtype, so sums can be kept in it
    columns: int  # of the vocabulary, that are in work together
    row_bytes: int  # of a token: its tile over the whole vocabulary, its hidden state and gradient
    column_bytes: int  # of a column in work: its weight row cast, its gradient before the cast
    cell_bytes: int  # of a column in work and one token, beside what is kept of it
    accumulator_bytes: int  # of one accumulator of the weight's gradient

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        head: HeadSlices,
        backend: Backend,
        workspace_bytes: int | None,
        temporaries: float | None = None,
    ) -> KeptSpace:
        """For this head and these hidden states; `temporaries` as in `plan_tiles`."""
        wide = accumulator_dtype(hidden.dtype).itemsize
        narrow, kept = (
            t.itemsize for t in (backend.products.operand_dtype(hidden), backend.products.tile_dtype(hidden))
        )
        vocab, width, direct = head.widest, head.width, head.weight_bytes == wide
        device = hidden.device.type
        budget = budget_of(workspace_bytes, device)
        column_bytes = width * head.copied_bytes(narrow) + head.trained_width * (0 if direct else wide)
        columns = min(vocab, _KEPT_COLUMNS.get(device, vocab))
        if column_bytes:
            columns = min(columns, max(64, budget // 8 // column_bytes))
        return cls(
            budget=budget,
            direct=direct,
            columns=_whole_blocks(columns, vocab),
            row_bytes=vocab * kept + width * (wide + narrow) + backend.products.row_bytes,
            column_bytes=column_bytes,
            cell_bytes=backend.cell_bytes(hidden, temporaries) - kept,
            accumulator_bytes=vocab * head.trained_width * wide,
        )

    def rows(self, accumulators: int) -> int:
        """Tokens whose whole-vocabulary tiles fit beside that many `[V, H]` accumulators."""
        left = self.budget - self.columns * self.column_bytes - accumulators * self.accumulator_bytes
        return max(0, left) // (self.row_bytes + self.columns * self.cell_bytes)


def plan_score_tiles(
    tokens: int, classes: int, like: Tensor, head: HeadSlices, backend: Backend, workspace_bytes: int | None
) -> TileShape:
    """Tiles beside which a column holds a row of the head and one of the sum M, and a row two of hidden states.

    All in the dtype of `like`; see `extras/nthr.py`.
    """
    states = 2 * head.width * like.dtype.itemsize
    budget = budget_of(workspace_bytes, like.device.type)
    columns = max(1, min(classes, budget // 4 // states))
    row = columns * backend.cell_bytes(like) + states + backend.products.row_bytes
    return TileShape(max(1, min(tokens, (budget - columns * states) // row)), columns)


def _whole_blocks(columns: int, vocab: int) -> int:
    """Columns rounded down to whole mass blocks, where there are several and not all."""
    return columns - columns % MASS_BLOCK if MASS_BLOCK < columns < vocab else columns


def block_width(tokens: int, vocab: int, device: str) -> int:
    """Columns of a block of the sparse backward: a multiple of MASS_BLOCK."""
    width = _BLOCK_WIDTH.get(device, _BLOCK_WIDTH["cuda"])
    while tokens * -(-vocab // width) > _MAX_CODE_BYTES and width < vocab:
        width *= 2
    return width
