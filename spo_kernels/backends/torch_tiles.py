"""The `torch` tile backend: plain tensor operations; runs anywhere and specifies the others."""

from collections.abc import Iterator

import torch
from torch import Tensor

from spo_kernels.backends.contract import MASS_BLOCK, LogitTransform, TokenGrads, TokenStats, add_at_labels_

# A tile is handled in this many pieces, so that temporaries stay small.
_PIECES = 16

# tile-sized temporaries of a piece at most: logits, exponentials, slopes and two products of them
TEMPORARIES = 5 / _PIECES


def _pieces(tile: Tensor) -> Iterator[slice]:
    step = -(-tile.shape[0] // _PIECES)
    for start in range(0, tile.shape[0], max(1, step)):
        yield slice(start, start + step)


def to_logits(tile: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """Logits of a tile of products, in a tensor of their own."""
    logits = tile + bias if bias is not None else tile.clone()
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
    for rows in _pieces(tile):
        part = None if rescale is None else rescale[rows]
        masses = None if block_lse is None else block_lse[rows]
        target = (tile if out is None else out)[rows]
        _stats_piece(tile[rows], bias, labels[rows], transform, stats.rows(rows.start, rows.stop), part, masses, target)


def _stats_piece(
    tile: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    transform: LogitTransform,
    stats: TokenStats,
    rescale: Tensor | None,
    block_lse: Tensor | None,
    out: Tensor,
) -> None:
    logits = to_logits(tile, bias, transform)
    if block_lse is not None:
        for i, block in enumerate(logits.split(MASS_BLOCK, 1)):
            torch.logsumexp(block, 1, out=block_lse[:, i])
    inside = (labels >= 0) & (labels < tile.shape[1])
    columns = labels.clamp(0, tile.shape[1] - 1)[:, None]
    label_logit = logits.gather(1, columns)[:, 0]
    stats.label_logit.copy_(torch.where(inside, label_logit, stats.label_logit))

    new_max = torch.maximum(stats.max, logits.amax(1))
    # a row whose columns so far are all -inf would otherwise give exp(-inf + inf) = nan
    finite_max = new_max.masked_fill(new_max == -torch.inf, 0.0)
    drop = stats.max - finite_max
    shrink = drop.exp()
    slope = 1.0 if rescale is None else logit_slope(logits, transform)
    shifted = logits.sub_(finite_max[:, None])
    exponential = shifted.exp()
    if stats.shifted_sum is not None and stats.square_sum is not None:
        # exp(-inf) * -inf counts as 0
        moment = shifted.mul_(exponential).masked_fill_(exponential == 0, 0.0)
        carried = stats.sum * drop.masked_fill(stats.sum == 0, 0.0)
        stats.shifted_sum.add_(carried).mul_(shrink).add_(moment.sum(1))
        stats.square_sum.mul_(shrink.square()).add_(exponential.square().sum(1))
    stats.sum.mul_(shrink).add_(exponential.sum(1))
    stats.max.copy_(new_max)
    if rescale is not None:
        rescale.copy_(shrink)
        weighted = exponential.mul_(slope)
        weighted.scatter_(1, columns, weighted.gather(1, columns).masked_fill_(inside[:, None], 0.0))
        out.copy_(weighted)


def tile_grad(
    tile: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    transform: LogitTransform,
    grads: TokenGrads,
    out: Tensor | None = None,
) -> None:
    """See `TileBackend.tile_grad`."""
    for rows in _pieces(tile):
        target = (tile if out is None else out)[rows]
        _grad_piece(tile[rows], bias, labels[rows], transform, grads.rows(rows.start, rows.stop), target)


def scale_rows(matrix: Tensor, factors: Tensor) -> None:
    """See `TileBackend.scale_rows`."""
    matrix.mul_(factors[:, None])


def _grad_piece(
    tile: Tensor, bias: Tensor | None, labels: Tensor, transform: LogitTransform, grads: TokenGrads, out: Tensor
) -> None:
    logits = to_logits(tile, bias, transform)
    slope = logit_slope(logits, transform)
    log_p = logits.sub_(grads.lse_value[:, None])
    if grads.only_logp:
        assert grads.logp is not None
        grad = log_p.exp_().mul_(-grads.logp[:, None])
    else:
        grad = _mixed_grad(log_p, grads)
    if grads.logp is not None:
        add_at_labels_(grad, labels, grads.logp)
    out.copy_(grad.mul_(slope))


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
