"""NTHR (arXiv 2505.18830): down-weights those tokens of incorrect responses that resemble the correct ones.

For the responses to one prompt, with `g_t = e_y - π(·|ctx)` (restricted to V*, the classes that occur as labels in
the group) and last hidden states h_t, a token's score is

    s_t = Σ_{k in correct responses} <g_k, g_t> <h_k, h_t> = rowsum((G M) * H)_t,    M = (G_correct)^T H_correct,

the inner product of the gradients of two log-probabilities with respect to the rows V* of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spo_kernels.arguments import check_not_negative
from spo_kernels.backends.contract import Backend, Tile, TokenGrads
from spo_kernels.backends.registry import load_backend
from spo_kernels.engine.autograd import LogprobCall
from spo_kernels.engine.checks import check_tensor, without_autocast
from spo_kernels.engine.head_slices import HeadSlices
from spo_kernels.engine.inputs import Execution, ModelInputs
from spo_kernels.engine.label_layout import LabelLayout
from spo_kernels.engine.renamed import refuses_old_names
from spo_kernels.engine.token_rows import TokenRows
from spo_kernels.engine.tokens import Tokens
from spo_kernels.engine.workspace import plan_score_tiles, spans
from spo_kernels.head import LMHead


@refuses_old_names
def nthr_multipliers(
    hidden: Tensor,
    head: Tensor | LMHead,
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
        hidden, head, labels, correct, cu_seqlens, ignore_index, shift, options: As in `nthr_scores`.
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
        hidden, head, labels, correct, cu_seqlens=cu_seqlens, ignore_index=ignore_index, shift=shift, **options
    )
    layout = LabelLayout(labels, ignore_index, shift, cu_seqlens)
    lengths = layout.count(layout.counted())
    spoken = correct & (lengths > 0)
    if not bool(spoken.any()) or bool(correct.all()):
        return torch.ones_like(scores)
    if eta is None:
        eta = 2.0 * abs(0.5 - correct.double().mean().item())
    threshold = beta * (layout.sum(scores) / lengths.clamp_min(1))[spoken].min()
    resembling = ~_of_tokens(correct, labels, cu_seqlens) & (scores > threshold)
    return torch.ones_like(scores).masked_fill(resembling, eta)


@refuses_old_names
@torch.no_grad()
def nthr_scores(
    hidden: Tensor,
    head: Tensor | LMHead,
    labels: Tensor,
    correct: Tensor,
    *,
    lse: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Score of every token of the G responses to one prompt, without `[N, V]` logits; no gradient.

    Equivalent PyTorch, padded::

        p = f(hidden @ head.weight.T + head.bias).softmax(-1)
        g = (one_hot(labels, V) - p)[..., labels.unique()]
        m = torch.einsum("stv,sth->vh", g[correct], hidden[correct])
        scores = ((g @ m) * hidden).sum(-1)

    With a scale or a softcap, g also has the factor d logit / d product. Cost: two products of size
    `[N, H] x [H, |V*|]`, two more for the correct tokens, and one with the whole head where `lse` is not given.

    Args:
        hidden: `[G, T, H]` padded, or `[N, H]` packed with `cu_seqlens`: the policy that sampled.
        head: `[V, H]` weight, or an `LMHead`.
        labels: `[G, T]` or `[N]` int64; `ignore_index` for prompt and padding.
        correct: `[G]` bool.
        lse: `linear_logprob(..., outputs=("lse",))` of the same call, labels' shape, where it is at hand.
        cu_seqlens: `[G + 1]` bounds of packed responses.
        ignore_index, shift, workspace_bytes, backend: As in `linear_logprob`.

    Returns:
        Scores, labels' shape, float32 (float64 for float64 inputs), 0 where a label does not count.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: An argument is wrong; the message names it.
    """
    layout = LabelLayout(labels, ignore_index, shift, cu_seqlens)
    layout.check_sequences("G, T")
    model = ModelInputs.resolve(hidden, head, labels)
    if model.shard is not None:
        raise ValueError(f"head has a {model.shard.name}; scores multiply rows of all processes: pass the whole head")
    if model.base is not None:
        raise ValueError("head carries adapters, whose gradients are not the rows of a head: merge them")
    execution = Execution.resolve(workspace_bytes, backend, model)
    _check(layout, correct, lse)
    found = Tokens.find(layout, layout.counted(), model.weight.shape[0])
    if lse is None:
        lse = LogprobCall.of(model, found, shift, execution).run()[1]["lse"]
    rows = TokenRows.of(found, shift)
    used, local = rows.labels.unique(return_inverse=True)
    tokens = _Tokens(
        hidden=model.hidden.reshape(-1, hidden.shape[-1]),
        rows=TokenRows(rows.rows, local),
        lse=rows.gather(lse).to(model.wide),
    )
    correct_tokens = rows.gather(_of_tokens(correct, labels, cu_seqlens))
    with without_autocast(hidden.device):
        scores = _scores(tokens, model.slices(), used, correct_tokens, load_backend(execution.backend), workspace_bytes)
    return rows.spread(scores, labels.shape)


@dataclass(frozen=True)
class _Tokens:
    """The n tokens that count."""

    hidden: Tensor  # [.., H]
    rows: TokenRows  # with indices into V* for labels
    lse: Tensor  # [n], over the whole vocabulary

    def select(self, mask: Tensor) -> _Tokens:
        """Those where the mask is True."""
        chosen = mask.nonzero()[:, 0]
        rows = chosen if self.rows.rows is None else self.rows.rows[chosen]
        return _Tokens(self.hidden, TokenRows(rows, self.rows.labels[chosen]), self.lse[chosen])


def _scores(
    tokens: _Tokens, head: HeadSlices, used: Tensor, correct: Tensor, backend: Backend, workspace_bytes: int | None
) -> Tensor:
    """Scores `[n]`; they are sums over the columns V*, which are taken slice by slice."""
    shape = plan_score_tiles(tokens.rows.count, used.numel(), tokens.lse, head, backend, workspace_bytes)
    scores = torch.zeros_like(tokens.lse)
    chosen = tokens.select(correct)
    for columns in spans(used.numel(), shape.columns):
        part = head.of_classes(used[columns], scores.dtype)
        tile = scores.new_empty(shape.rows, part.vocab)
        correct_sum = torch.zeros_like(part.weight)  # M
        for rows in spans(chosen.rows.count, shape.rows):
            states, g = _residuals(chosen, part, rows, columns.start, tile, backend)
            backend.products.matmul(g.t(), states, out=correct_sum, accumulate=True)
        for rows in spans(tokens.rows.count, shape.rows):
            states, g = _residuals(tokens, part, rows, columns.start, tile, backend)
            pulled = torch.empty_like(states)
            backend.products.matmul(g, correct_sum, out=pulled)
            scores[rows] += pulled.mul_(states).sum(-1)
    return scores


def _residuals(
    tokens: _Tokens, head: HeadSlices, rows: slice, start: int, tile: Tensor, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Hidden states, and g in the tile, of some tokens, for a slice of V* that begins at `start`."""
    states = tokens.rows.take(tokens.hidden, rows.start, rows.stop, tile.dtype)
    g, lse = tile[: rows.stop - rows.start], tokens.lse[rows]
    backend.products.matmul(states, head.weight.t(), out=g)
    grads = TokenGrads(lse_value=lse, logp=torch.ones_like(lse))
    backend.tile_grad(Tile(g, tokens.rows.labels[rows] - start, head.transform, head.bias), grads)
    return states, g


def _of_tokens(values: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A value per sequence as one per label."""
    if cu_seqlens is None:
        return values[:, None].expand(labels.shape)
    return values.repeat_interleave(cu_seqlens.diff().long())


def _check(layout: LabelLayout, correct: Tensor, lse: Tensor | None) -> None:
    labels, group = layout.labels, layout.sequences
    check_tensor("correct", correct)
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
