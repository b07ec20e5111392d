"""NTHR (arXiv 2505.18830): down-weights those tokens of incorrect responses that resemble the correct ones.

For the responses to one prompt, with `g_t = e_y - π(·|ctx)` (restricted to V*, the classes that occur as labels in
the group) and last hidden states h_t, a token's score is

    s_t = Σ_{k in correct responses} <g_k, g_t> <h_k, h_t> = rowsum((G M) * H)_t,    M = (G_correct)^T H_correct,

the inner product of the gradients of two log-probabilities with respect to the rows V* of the head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends.contract import Backend, LogitTransform, Tile, TokenGrads
from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.backends.registry import load_backend
from spo_kernels.engine.checks import check_head_inputs, check_label_range, check_tensor
from spo_kernels.engine.exact import Head, TokenRows, workspace_budget
from spo_kernels.logprob import prepare_call
from spo_kernels.losses.pairs import check_not_negative
from spo_kernels.sequences import check_cu_seqlens, count_tokens, counted_labels, sum_sequences


def nthr_multipliers(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    correct: Tensor,
    *,
    beta: float = 1.0,
    eta: float | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    **options: Any,
) -> Tensor:
    """What to multiply the advantages of one prompt's tokens with: η for incorrect tokens with `s_t > τ`, else 1.

    `τ = β · min_i (mean score of correct response i's tokens)`.

    Args:
        hidden, weight, labels, correct, cu_seqlens, ignore_index, shift, options: As in `nthr_scores`.
        beta: β >= 0; the paper's is 1.
        eta: η >= 0; None for `2 |0.5 - p|` with p the share of correct responses (the paper's training runs; its
            analysis takes 0).

    Returns:
        Detached, labels' shape, in the dtype of the scores. All 1 where no response is correct, or all are.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: An argument is wrong; the message names it.
    """
    check_not_negative("beta", beta)
    if eta is not None:
        check_not_negative("eta", eta)
    scores = nthr_scores(
        hidden, weight, labels, correct, cu_seqlens=cu_seqlens, ignore_index=ignore_index, shift=shift, **options
    )
    labels = counted_labels(labels, cu_seqlens, ignore_index, shift)
    lengths = count_tokens(labels, cu_seqlens, ignore_index)
    spoken = correct & (lengths > 0)
    if not bool(spoken.any()) or bool(correct.all()):
        return torch.ones_like(scores)
    if eta is None:
        eta = 2.0 * abs(0.5 - correct.double().mean().item())
    threshold = beta * (sum_sequences(scores, cu_seqlens) / lengths.clamp_min(1))[spoken].min()
    resembling = ~_of_tokens(correct, labels, cu_seqlens) & (scores > threshold)
    return torch.ones_like(scores).masked_fill(resembling, eta)


@torch.no_grad()
def nthr_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    correct: Tensor,
    *,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Score of every token of the G responses to one prompt, without `[N, V]` logits; no gradient.

    Equivalent PyTorch, padded::

        p = f(hidden @ weight.T + bias).softmax(-1)
        g = (one_hot(labels, V) - p)[..., labels.unique()]
        m = torch.einsum("stv,sth->vh", g[correct], hidden[correct])
        scores = ((g @ m) * hidden).sum(-1)

    With `logit_scale` or `logit_softcap`, g also has the factor d logit / d product. Cost: two products of size
    `[N, H] x [H, |V*|]`, two more for the correct tokens, and one with the whole head where `lse` is not given.

    Args:
        hidden: `[G, T, H]` padded, or `[N, H]` packed with `cu_seqlens`: the policy that sampled.
        weight, bias: `[V, H]` and `[V]`.
        labels: `[G, T]` or `[N]` int64; `ignore_index` for prompt and padding.
        correct: `[G]` bool.
        lse: `linear_logprob(..., outputs=("lse",))` of the same call, labels' shape, where it is at hand.
        cu_seqlens: `[G + 1]` bounds of packed responses.
        logit_scale, logit_softcap, ignore_index, shift, workspace_bytes, backend: As in `linear_logprob`.

    Returns:
        Scores, labels' shape, float32 (float64 for float64 inputs), 0 where a label does not count.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: An argument is wrong; the message names it.
    """
    _check(hidden, weight, bias, labels, correct, lse, cu_seqlens)
    labels = counted_labels(labels, cu_seqlens, ignore_index, shift)
    call = prepare_call(
        hidden,
        weight,
        labels,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        ignore_index=ignore_index,
        shift=shift,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    check_label_range(labels, weight.shape[0], ignore_index)
    if lse is None:
        lse = call.run()[1]["lse"]
    positions = (labels.flatten() != ignore_index).nonzero()[:, 0]
    used, local = labels.flatten()[positions].unique(return_inverse=True)
    tokens = _Tokens(
        hidden=call.hidden.reshape(-1, hidden.shape[-1]),
        rows=positions - 1 if shift else positions,
        labels=local,
        lse=lse.flatten()[positions].to(accumulator_dtype(call.hidden.dtype)),
    )
    head = Head(call.weight, call.bias, LogitTransform(logit_scale, logit_softcap))
    correct_tokens = _of_tokens(correct, labels, cu_seqlens).flatten()[positions]
    with torch.autocast(hidden.device.type, enabled=False):
        found = _scores(tokens, head, used, correct_tokens, load_backend(call.options.backend), workspace_bytes)
    scores = found.new_zeros(labels.numel())
    scores[positions] = found
    return scores.view(labels.shape)


@dataclass(frozen=True)
class _Tokens:
    """The n tokens that count."""

    hidden: Tensor  # [.., H]
    rows: Tensor  # [n], the rows of hidden that predict them
    labels: Tensor  # [n], indices into V*
    lse: Tensor  # [n], over the whole vocabulary

    def select(self, mask: Tensor) -> "_Tokens":
        """Those where the mask is True."""
        return _Tokens(self.hidden, self.rows[mask], self.labels[mask], self.lse[mask])


def _scores(
    tokens: _Tokens, head: Head, used: Tensor, correct: Tensor, backend: Backend, workspace_bytes: int | None
) -> Tensor:
    """Scores `[n]`; they are sums over the columns V*, which are taken slice by slice."""
    rows, columns = _tile_shape(tokens, used.numel(), backend, workspace_bytes)
    scores = torch.zeros_like(tokens.lse)
    chosen = tokens.select(correct)
    for start in range(0, used.numel(), columns):
        classes = used[start : start + columns]
        bias = None if head.bias is None else head.bias[classes].to(scores.dtype)
        part = Head(head.weight[classes].to(scores.dtype), bias, head.transform)
        tile = scores.new_empty(rows, classes.numel())
        moments = torch.zeros_like(part.weight)
        for first in range(0, chosen.labels.numel(), rows):
            states, g = _residuals(chosen, part, first, start, tile, backend)
            backend.products.matmul(g.t(), states, out=moments, accumulate=True)
        for first in range(0, tokens.labels.numel(), rows):
            states, g = _residuals(tokens, part, first, start, tile, backend)
            pulled = torch.empty_like(states)
            backend.products.matmul(g, moments, out=pulled)
            scores[first : first + rows] += pulled.mul_(states).sum(-1)
    return scores


def _residuals(
    tokens: _Tokens, head: Head, first: int, start: int, tile: Tensor, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Hidden states, and g in the tile, of the tokens from `first` on, for the head's rows from `start` on."""
    stop = min(first + tile.shape[0], tokens.labels.numel())
    rows = TokenRows(tokens.rows, tokens.labels)
    states = rows.take(tokens.hidden, first, stop, tile.dtype)
    g, lse = tile[: stop - first], tokens.lse[first:stop]
    backend.products.matmul(states, head.weight.t(), out=g)
    grads = TokenGrads(lse_value=lse, logp=torch.ones_like(lse))
    backend.tile_grad(Tile(g, tokens.labels[first:stop] - start, head.transform, head.bias), grads)
    return states, g


def _tile_shape(tokens: _Tokens, classes: int, backend: Backend, workspace_bytes: int | None) -> tuple[int, int]:
    """Rows and columns of a tile. A column takes a row of the head and one of M, a row two of hidden states."""
    width, wide = tokens.hidden.shape[1], tokens.lse.dtype.itemsize
    budget = workspace_budget(workspace_bytes, tokens.hidden.device.type)
    columns = max(1, min(classes, budget // 4 // (2 * width * wide)))
    cell = backend.cell_bytes(tokens.lse)
    row = columns * cell + 2 * width * wide + backend.products.row_bytes
    return max(1, min(tokens.labels.numel(), (budget - columns * 2 * width * wide) // row)), columns


def _of_tokens(values: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A value per sequence as one per label."""
    if cu_seqlens is None:
        return values[:, None].expand(labels.shape)
    return values.repeat_interleave(cu_seqlens.diff().long())


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    correct: Tensor,
    lse: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    check_tensor("hidden", hidden)
    check_tensor("labels", labels)
    check_tensor("correct", correct)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, hidden)
    elif hidden.ndim != 3:
        raise ValueError(f"hidden must be [G, T, H], or [N, H] with cu_seqlens; got {list(hidden.shape)}")
    check_head_inputs(hidden, weight, bias, labels)
    group = hidden.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if correct.shape != (group,) or correct.dtype != torch.bool or correct.device != labels.device:
        came = f"{correct.dtype} {list(correct.shape)} on {correct.device}"
        raise ValueError(f"correct must be bool, one for each of the {group} responses, on {labels.device}; got {came}")
    if lse is not None:
        check_tensor("lse", lse)
        if lse.shape != labels.shape or lse.device != labels.device:
            raise ValueError(
                f"lse must have labels' shape {list(labels.shape)} on {labels.device}, "
                f"got {list(lse.shape)} on {lse.device}"
            )
