"""The `torch` backend: plain tensor operations; runs anywhere and specifies the others."""

from collections.abc import Iterator

import torch
from torch import Tensor

from spo_kernels.backends.contract import (
    MASS_BLOCK,
    Backend,
    LogitTransform,
    Tile,
    TokenGrads,
    TokenStats,
    add_at_labels_,
)
from spo_kernels.backends.products import VendorProducts
from spo_kernels.backends.registration import BackendStatus, Registration

# A tile is handled in this many pieces, so that temporaries stay small,
PIECES = 16
# none of fewer cells: a piece costs 100 us of launches, and the temporaries of so few take 160 KiB
_SMALLEST_PIECE = 8192


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a tile of that shape which are handled together."""
    step = max(-(-rows // PIECES), _SMALLEST_PIECE // max(columns, 1), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def to_logits(products: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """Logits of a tile of products, in a tensor of their own."""
    logits = products + bias if bias is not None else products.clone()
    if transform.scale != 1.0:
        logits *= transform.scale
    if transform.softcap is not None:
        logits.div_(transform.softcap).tanh_().mul_(transform.softcap)
    return logits


def logit_slope(logits: Tensor, transform: LogitTransform) -> Tensor | float:
    """d logit / d product, from the logit."""
    if transform.softcap is None:
        return transform.scale
    return (logits / transform.softcap).square_().neg_().add_(1.0).mul_(transform.scale)


class TorchBackend(Backend):
    """See `Backend`; the specification, in float32 and float64."""

    name = "torch"
    # of a piece at most: logits, exponentials, slopes and two products of them
    temporaries = 5 / PIECES

    def __init__(self) -> None:
        self.products = VendorProducts()

    def tile_stats(
        self, tile: Tile, stats: TokenStats, *, rescale: Tensor | None = None, block_lse: Tensor | None = None
    ) -> None:
        """See `Backend`."""
        for rows in pieces(*tile.products.shape):
            part = tile.rows(rows.start, rows.stop)
            masses = None if block_lse is None else block_lse[rows]
            shrink = None if rescale is None else rescale[rows]
            _stats_piece(part, stats.rows(rows.start, rows.stop), shrink, masses)

    def tile_grad(self, tile: Tile, grads: TokenGrads) -> None:
        """See `Backend`."""
        for rows in pieces(*tile.products.shape):
            _grad_piece(tile.rows(rows.start, rows.stop), grads.rows(rows.start, rows.stop))

    def scale_rows(self, matrix: Tensor, factors: Tensor) -> None:
        """See `Backend`."""
        matrix.mul_(factors[:, None])


REGISTRATION = Registration(
    name=TorchBackend.name,
    automatic_on=(),
    status=lambda: BackendStatus(True, "plain torch operations, any device and dtype"),
    why_not=lambda device, dtype: None,
    load=TorchBackend,
)


def _stats_piece(tile: Tile, stats: TokenStats, rescale: Tensor | None, block_lse: Tensor | None) -> None:
    columns = tile.products.shape[1]
    logits = to_logits(tile.products, tile.bias, tile.transform)
    if block_lse is not None:
        for i, block in enumerate(logits.split(MASS_BLOCK, 1)):
            torch.logsumexp(block, 1, out=block_lse[:, i])
    inside = (tile.labels >= 0) & (tile.labels < columns)
    label_column = tile.labels.clamp(0, columns - 1)[:, None]
    label_logit = logits.gather(1, label_column)[:, 0]
    stats.label_logit.copy_(torch.where(inside, label_logit, stats.label_logit))

    shrink = stats.rebase_(logits.amax(1))
    slope = 1.0 if rescale is None else logit_slope(logits, tile.transform)
    shifted = logits.sub_(stats.base[:, None])
    exponential = shifted.exp()
    if stats.shifted_sum is not None and stats.square_sum is not None:
        # exp(-inf) * -inf counts as 0
        moment = shifted.mul_(exponential).masked_fill_(exponential == 0, 0.0)
        stats.shifted_sum.add_(moment.sum(1))
        stats.square_sum.add_(exponential.square().sum(1))
    stats.sum.add_(exponential.sum(1))
    if rescale is not None:
        rescale.copy_(shrink)
        weighted = exponential.mul_(slope)
        weighted.scatter_(1, label_column, weighted.gather(1, label_column).masked_fill_(inside[:, None], 0.0))
        tile.written.copy_(weighted)


def _grad_piece(tile: Tile, grads: TokenGrads) -> None:
    logits = to_logits(tile.products, tile.bias, tile.transform)
    slope = logit_slope(logits, tile.transform)
    log_p = logits.sub_(grads.lse_value[:, None])
    if grads.lse_rest is not None:
        log_p -= grads.lse_rest[:, None]
    if grads.only_logp:
        assert grads.logp is not None
        grad = log_p.exp_().mul_(-grads.logp[:, None])
    else:
        grad = _mixed_grad(log_p, grads)
    if grads.logp is not None:
        add_at_labels_(grad, tile.labels, grads.logp)
    tile.written.copy_(grad.mul_(slope))


def _mixed_grad(log_p: Tensor, grads: TokenGrads) -> Tensor:
    """The part of d loss / d logit that is a function of the column's probability alone."""
    p = log_p.exp()
    weight = torch.zeros_like(grads.lse_value)
    if grads.logp is not None:
        weight -= grads.logp
    if grads.lse is not None:
        weight += grads.lse
    if grads.log_sum_p2 is not None:
        weight -= 2.0 * grads.log_sum_p2
    grad = p * weight[:, None]
    if grads.entropy is not None and grads.entropy_value is not None:
        information = (log_p + grads.entropy_value[:, None]).masked_fill_(p == 0, 0.0)
        grad -= grads.entropy[:, None] * p * information
    if grads.log_sum_p2 is not None and grads.log_sum_p2_value is not None:
        share = (2.0 * log_p - grads.log_sum_p2_value[:, None]).exp_()
        grad += 2.0 * grads.log_sum_p2[:, None] * share
    return grad
