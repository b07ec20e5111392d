"""Walks tiles of the (token, vocabulary) plane: the only place that knows budgets and loop order.

Tokens here are those that count: `rows[i]` is the row of `hidden` that predicts `labels[i]`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.backends.contract import MASS_BLOCK, Backend, LogitTransform, Tile, TokenGrads, TokenStats
from spo_kernels.backends.products import Products, accumulator_dtype, headroom
from spo_kernels.engine.sparse_blocks import BlockChooser

DEFAULT_WORKSPACE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}

# below this many columns a product spends its time on reading the token tile again
_MIN_COLUMNS = 512
_MAX_ROWS = {"cpu": 2048, "cuda": 4096}
# on a GPU wider tiles make a product no faster, and 8192 columns are a block of the Triton kernels
_DEFAULT_COLUMNS = {"cuda": 8192}


@dataclass(frozen=True)
class Head:
    """The LM head and what turns its products into logits."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    transform: LogitTransform

    def bias_slice(self, start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        """Some of the bias, in the accumulator dtype."""
        return None if self.bias is None else self.bias[start:stop].to(dtype).contiguous()


@dataclass(frozen=True)
class TokenRows:
    """The tokens that count: `rows` index hidden (None: all of it, in order), `labels` are their targets.

    With `mask`, tokens where it is False are among them: they read and write zeros.
    """

    rows: Tensor | None
    labels: Tensor  # [n]
    mask: Tensor | None = None  # [n], bool

    def take(self, hidden: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Hidden states of tokens start..stop in the dtype of the products."""
        chosen = hidden[start:stop] if self.rows is None else hidden[self.rows[start:stop]]
        return self._masked(chosen, start, stop).to(dtype)

    def operand(self, hidden: Tensor, part: slice | Tensor, products: Products) -> tuple[Tensor, Tensor | None]:
        """Hidden states of some tokens as products take them: copied, or `hidden` and the list of its rows."""
        dtype = products.operand_dtype(hidden)
        if isinstance(part, slice):
            return self.take(hidden, part.start, part.stop, dtype), None
        rows = part if self.rows is None else self.rows[part]
        return (hidden, rows) if products.reads_row_lists(hidden) else (hidden[rows].to(dtype), None)

    def put(self, out: Tensor, start: int, stop: int, values: Tensor) -> None:
        """Write per-token rows to where `take` reads them."""
        values = self._masked(values, start, stop)
        if self.rows is None:
            out[start:stop] = values
        else:
            out[self.rows[start:stop]] = values.to(out.dtype)

    def _masked(self, values: Tensor, start: int, stop: int) -> Tensor:
        return values if self.mask is None else values.masked_fill(~self.mask[start:stop, None], 0.0)


@dataclass(frozen=True)
class TileShape:
    """Rows and columns of a tile, and the workspace that they need."""

    rows: int
    columns: int


def workspace_budget(workspace_bytes: int | None, device: str) -> int:
    """The bytes that a call may use for temporaries: what it says, or the device's default."""
    return workspace_bytes or DEFAULT_WORKSPACE_BYTES.get(device, DEFAULT_WORKSPACE_BYTES["cuda"])


def plan_tiles(
    tokens: int,
    hidden: Tensor,
    head: Head,
    backend: Backend,
    workspace_bytes: int | None,
    *,
    models: int = 1,
    temporaries: float | None = None,
) -> TileShape:
    """The largest tile whose temporaries fit the byte budget, of which each of `models` heads in work has its share.

    Per cell: see `Backend.cell_bytes`. Per row: the gathered token, its accumulated sum and what the product packs.
    Per column: the weight row where it is cast, and its accumulated gradient or a label's weight row.
    """
    vocab, width = head.weight.shape
    wide = accumulator_dtype(hidden.dtype).itemsize
    narrow = backend.products.operand_dtype(hidden).itemsize
    cell = backend.cell_bytes(hidden, temporaries)
    row = width * (wide + narrow) + backend.products.row_bytes
    column = width * (wide + (narrow if narrow != head.weight.dtype.itemsize else 0))
    device = hidden.device.type
    budget = workspace_budget(workspace_bytes, device) // models
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
    if MASS_BLOCK < columns < vocab:
        columns -= columns % MASS_BLOCK
    return TileShape(rows, columns)


class TileBuffers:
    """One tile of products and, where the next product takes narrower operands, one of those; used over and over."""

    def __init__(self, hidden: Tensor, cells: int, products: Products | None) -> None:
        """Without `products`, tiles enter no other product."""
        self.wide = hidden.new_empty(cells, dtype=accumulator_dtype(hidden.dtype))
        self.narrow: Tensor | None = None
        if products is not None and products.tile_dtype(hidden) != self.wide.dtype:
            self.narrow = hidden.new_empty(cells, dtype=products.tile_dtype(hidden))

    def tile(self, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        """The products' tile, and what a backend is to write instead of it."""
        cells = rows * columns
        out = None if self.narrow is None else self.narrow[:cells].view(rows, columns)
        return self.wide[:cells].view(rows, columns), out


def forward(
    hidden: Tensor,
    head: Head,
    tokens: TokenRows,
    backend: Backend,
    tile_shape: TileShape,
    *,
    moments: bool,
    logp_grad: Tensor | None,
    chooser: BlockChooser | None = None,
) -> TokenStats:
    """Softmax statistics of every token: one product; with `logp_grad`, two.

    `chooser` is shown the masses of vocabulary blocks; not together with `logp_grad`.

    `logp_grad` (hidden's shape) receives `u = d logp / d hidden`, from the running sum
    `A = Σ_{v≠label} exp(logit_v - max) logit'_v W_v` that is rescaled whenever the maximum moves:
    `u = logit'_label (1 - p_label) W_label - A / Σ exp`.
    """
    n = tokens.labels.numel()
    vocab = head.weight.shape[0]
    wide = accumulator_dtype(hidden.dtype)
    cells = min(n, tile_shape.rows) * tile_shape.columns
    buffers = TileBuffers(hidden, cells, None if logp_grad is None else backend.products)
    stats = TokenStats.start(n, buffers.wide, moments)
    for row in range(0, n, tile_shape.rows):
        end = min(row + tile_shape.rows, n)
        states = tokens.take(hidden, row, end, backend.products.operand_dtype(hidden))
        part = stats.rows(row, end)
        labels = tokens.labels[row:end]
        total = rescale = None
        if logp_grad is not None:
            total = states.new_empty(states.shape, dtype=wide)
            rescale = states.new_empty(end - row, dtype=wide)
        for col in range(0, vocab, tile_shape.columns):
            stop = min(col + tile_shape.columns, vocab)
            weight = head.weight[col:stop].to(states.dtype)
            tile, out = buffers.tile(end - row, stop - col)
            backend.products.matmul(states, weight.t(), out=tile)
            bias = head.bias_slice(col, stop, wide)
            masses = None if chooser is None else chooser.masses(end - row, col, stop)
            given = Tile(tile, labels - col, head.transform, bias, out)
            backend.tile_stats(given, part, rescale=rescale, block_lse=masses)
            if total is not None and rescale is not None:
                if col > 0:
                    backend.scale_rows(total, rescale)
                backend.products.matmul(tile if out is None else out, weight, out=total, accumulate=col > 0)
        if chooser is not None:
            chooser.choose(row, end, part, labels)
        if total is not None and logp_grad is not None:
            _finish_logp_grad_(total, head, labels, part, tile_shape)
            tokens.put(logp_grad, row, end, total)
    return stats


def _finish_logp_grad_(total: Tensor, head: Head, labels: Tensor, stats: TokenStats, tile_shape: TileShape) -> None:
    """Turn `A` into `u`, see `forward`; label rows are gathered in pieces no larger than a weight slice."""
    total.div_(stats.sum[:, None]).neg_()
    coefficient = label_slope(stats, head.transform)
    for row in range(0, total.shape[0], tile_shape.columns):
        piece = slice(row, row + tile_shape.columns)
        total[piece].addcmul_(coefficient[piece, None], head.weight[labels[piece]].to(total.dtype))


def label_slope(stats: TokenStats, transform: LogitTransform) -> Tensor:
    """d logp / d product at each token's label, `(1 - p) d logit / d product`."""
    rest = -torch.expm1(stats.label_logit - stats.max - stats.sum.log()) * transform.scale
    return rest if transform.softcap is None else rest * (1.0 - (stats.label_logit / transform.softcap).square())


# tokens of a tile, as consecutive ones or listed, and what their upstream gradients are multiplied by
Part = tuple[slice | Tensor, Tensor | None]


def _count(part: slice | Tensor) -> int:
    return part.stop - part.start if isinstance(part, slice) else part.numel()


@dataclass(frozen=True)
class VocabularySlice:
    """Columns start..stop, and the tokens that they are multiplied with, tile by tile; no token twice."""

    start: int
    stop: int
    parts: Sequence[Part]


def every_slice(tokens: int, vocab: int, tile_shape: TileShape) -> Iterator[VocabularySlice]:
    """All tokens with all columns."""
    rows = [slice(row, min(row + tile_shape.rows, tokens)) for row in range(0, tokens, tile_shape.rows)]
    for start in range(0, vocab, tile_shape.columns):
        yield VocabularySlice(start, min(start + tile_shape.columns, vocab), [(part, None) for part in rows])


def backward(
    hidden: Tensor,
    head: Head,
    tokens: TokenRows,
    grads: TokenGrads,
    backend: Backend,
    tile_shape: TileShape,
    hidden_out: Tensor | None,
    weight_out: Tensor | None,
    bias_out: Tensor | None,
    slices: Iterable[VocabularySlice] | None = None,
) -> None:
    """Gradients by recomputing logits, vocabulary slice by slice: one product, and one per matrix gradient.

    A slice of the weight's gradient is finished before the next begins, so no `[V, H]` accumulator exists;
    hidden's gradient is accumulated over slices in the accumulator dtype. `slices` (default: `every_slice`) covers
    the vocabulary in order with tiles no larger than `tile_shape`.
    """
    n, vocab, products = tokens.labels.numel(), head.weight.shape[0], backend.products
    wide, narrow = accumulator_dtype(hidden.dtype), products.operand_dtype(hidden)
    buffers = TileBuffers(hidden, min(n, tile_shape.rows) * tile_shape.columns, products)
    unit = None
    if buffers.narrow is not None and buffers.narrow.dtype == torch.float16:
        unit = headroom(list(grads.upstream().values()), head.transform.scale)
        grads = grads if unit is None else grads.scale_upstream(1.0 / unit)
    allocate = hidden.new_empty if slices is None else hidden.new_zeros
    hidden_sum = None if hidden_out is None else allocate((n, hidden.shape[1]), dtype=wide)
    for piece in every_slice(n, vocab, tile_shape) if slices is None else slices:
        columns = slice(piece.start, piece.stop)
        weight = head.weight[columns].to(narrow)
        bias = head.bias_slice(piece.start, piece.stop, wide)
        weight_sum = None
        if weight_out is not None:
            rounds = len(piece.parts) == 1 and products.can_round(weight, _count(piece.parts[0][0]))
            direct = weight_out.dtype in ((wide, narrow) if rounds else (wide,))
            weight_sum = weight_out[columns] if direct else weight.new_empty(weight.shape, dtype=wide)
            if not piece.parts:
                weight_sum.zero_()
        for number, (part, factors) in enumerate(piece.parts):
            states, listed = tokens.operand(hidden, part, products)
            labels = tokens.labels[part] - piece.start
            tile, out = buffers.tile(labels.numel(), piece.stop - piece.start)
            products.matmul(states, weight.t(), out=tile, a_rows=listed)
            upstream = grads.map(lambda values, part=part: values[part])  # type: ignore[misc]
            upstream = upstream if factors is None else upstream.scale_upstream(factors)
            backend.tile_grad(Tile(tile, labels, head.transform, bias, out), upstream)
            operand = tile if out is None else out
            if weight_sum is not None:
                products.matmul(operand.t(), states, out=weight_sum, accumulate=number > 0, b_rows=listed)
            if hidden_sum is not None:
                if isinstance(part, slice):
                    products.matmul(operand, weight, out=hidden_sum[part], accumulate=piece.start > 0)
                else:
                    products.matmul(operand, weight, out=hidden_sum, accumulate=True, out_rows=part)
            if bias_out is not None:
                bias_out[columns] += operand.sum(0, dtype=wide)
        if weight_out is not None and weight_sum is not None and weight_sum.dtype != weight_out.dtype:
            weight_out[columns] = weight_sum if unit is None else weight_sum.mul_(unit)
    if unit is not None and bias_out is not None:
        bias_out.mul_(unit)
    if hidden_out is not None and hidden_sum is not None:
        tokens.put(hidden_out, 0, n, hidden_sum if unit is None else hidden_sum.mul_(unit))
