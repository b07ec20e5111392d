"""A pair loss and its gradients in three products, for a trained head; see `preference/plan.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends.contract import MASS_BLOCK, Backend, LogitTransform, TokenStats
from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.backends.registry import load_backend
from spo_kernels.engine.checks import check_label_range
from spo_kernels.engine.exact import Head, TokenRows, workspace_budget
from spo_kernels.engine.kept import GradientSums, KeptTiles
from spo_kernels.engine.memory import in_huge_pages
from spo_kernels.engine.ops import capturing
from spo_kernels.logprob import LogprobCall
from spo_kernels.losses.pairs import Objective, PairInputs, by_side, coupling_of, pair_losses, token_outputs_of
from spo_kernels.preference.kernel import PairKernel
from spo_kernels.preference.plan import PairProblem, PathPlan, choose_path
from spo_kernels.sequences import sum_segments

# slices of 2048 tokens' logits, of the weight and of its gradient stay in the cache that a product left them in
_SLICE_COLUMNS = {"cpu": 1024}


def plan_path(
    call: LogprobCall, objective: Objective, tokens: Tensor, forced: str | None, *, per_pair: bool
) -> PathPlan:
    """The path of this call, whose sequences have `tokens` (`[2B]`, chosen first) in the products.

    Three products need a trained head and one loss: `per_pair` losses have many upstreams.

    Raises:
        ValueError: `forced` names a path that cannot be taken.
    """
    hidden, weight = call.hidden, call.weight
    trained = torch.is_grad_enabled() and (weight.requires_grad or (call.bias is not None and call.bias.requires_grad))
    # the objective runs inside the forward there, where torch.compile cannot see it
    traced = torch.compiler.is_compiling()
    # the path depends on lengths, which are not known while a CUDA graph is recorded
    if not trained or per_pair or traced or tokens.numel() == 0 or capturing(call.labels):
        return PathPlan("two_pass", 4)
    names = token_outputs_of(objective)
    reason = "its objective needs kl, which has a gradient of its own" if "kl" in names else None
    if hidden.dtype == torch.float16:
        # a scaled loss is what brings them into it, and it comes after the forward
        reason = "unscaled gradients may lie below float16's range"
    if call.options.sparsity.mode != "exact":
        reason = "a sparse backward takes two passes"
    if reason is not None and forced in ("packed", "factorised"):
        raise ValueError(f"path = {forced!r} cannot be taken: {reason}")
    if reason is not None:
        return PathPlan("two_pass", 4)
    backend = load_backend(call.options.backend)
    wide, narrow = accumulator_dtype(hidden.dtype).itemsize, backend.products.operand_dtype(hidden).itemsize
    kept = backend.products.tile_dtype(hidden).itemsize
    (vocab, width), direct = weight.shape, weight.dtype.itemsize == wide
    chosen, rejected = tokens.view(2, -1)
    budget = workspace_budget(call.options.workspace_bytes, hidden.device.type)
    column_bytes = width * ((0 if narrow == weight.dtype.itemsize else narrow) + (0 if direct else wide))
    problem = PairProblem(
        coupling=coupling_of(objective),
        whole_pairs=bool(names),
        pair_tokens=tuple((chosen + rejected).tolist()),
        direct=direct,
        vocab=vocab,
        row_bytes=vocab * kept + width * (wide + narrow) + backend.products.row_bytes,
        columns=_columns(vocab, column_bytes, budget, hidden.device.type),
        column_bytes=column_bytes,
        cell_bytes=backend.cell_bytes(hidden) - kept,
        accumulator_bytes=vocab * width * wide,
        workspace_bytes=budget,
    )
    return choose_path(problem, forced)


def _columns(vocab: int, column_bytes: int, budget: int, device: str) -> int:
    """Columns of the vocabulary that are in work together."""
    columns = _SLICE_COLUMNS.get(device, vocab)
    if column_bytes:
        columns = min(columns, max(64, budget // 8 // column_bytes))
    if MASS_BLOCK < columns < vocab:
        columns -= columns % MASS_BLOCK
    return min(columns, vocab)


def three_products(
    call: LogprobCall,
    objective: Objective,
    inputs: PairInputs,
    tokens: Tensor,
    token_weights: Tensor | None,
    plan: PathPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """`scale * Σ losses`, losses `[B]`, sequence sums `[2B]`, and sums of the token metrics; `tokens` as planned."""
    options = call.options
    check_label_range(call.labels, call.weight.shape[0], options.ignore_index)
    positions = (call.labels.flatten() != options.ignore_index).nonzero()[:, 0]
    pair_call = PairCall(
        objective=objective,
        inputs=inputs,
        rows=positions - 1 if options.shift else positions,
        labels=call.labels.flatten()[positions],
        token_weights=None if token_weights is None else token_weights.flatten()[positions],
        lengths=tokens.tolist(),
        plan=plan,
        transform=LogitTransform(options.logit_scale, options.logit_softcap),
        backend=load_backend(options.backend),
        loss_scale=scale,
        moments=options.moments,
        kernel=PairKernel.of(objective, inputs, options.backend) if token_weights is None else None,
    )
    result, losses, sums = ThreeProductFunction.apply(call.hidden, call.weight, call.bias, pair_call)
    return result, losses, sums, pair_call.token_sums


@dataclass
class PairCall:
    """One call: what is not a differentiable tensor, and what the forward finds out."""

    objective: Objective
    inputs: PairInputs
    rows: Tensor  # rows of hidden whose tokens count, sequence by sequence, chosen first
    labels: Tensor  # their labels
    token_weights: Tensor | None  # what they weigh in the sequence sums
    lengths: list[int]  # [2B], how many each sequence has
    plan: PathPlan
    transform: LogitTransform
    backend: Backend
    loss_scale: float  # 1/B for a mean over pairs
    moments: bool
    kernel: PairKernel | None  # does in one launch what `differentiate` does with torch's operations

    def __post_init__(self) -> None:
        self.bounds = [0, *accumulate(self.lengths)]
        self.pairs = len(self.lengths) // 2
        zero = self.labels.new_zeros((), dtype=torch.float32)
        self.token_sums: dict[str, Tensor] = {"entropy": zero, "mean_token_accuracy": zero}

    def select(self, start: int, stop: int) -> TokenRows:
        """The tokens start..stop."""
        return TokenRows(self.rows[start:stop], self.labels[start:stop])

    def select_pairs(self, pairs: range) -> tuple[TokenRows, Tensor | None, list[int]]:
        """The tokens of consecutive pairs, chosen first, their weights, and how many each sequence has."""
        sequences = [range(first + pairs.start, first + pairs.stop) for first in (0, self.pairs)]
        parts = [slice(self.bounds[s.start], self.bounds[s.stop]) for s in sequences]
        rows, labels, weights = (
            None if values is None else torch.cat([values[part] for part in parts])
            for values in (self.rows, self.labels, self.token_weights)
        )
        assert labels is not None
        return TokenRows(rows, labels), weights, [self.lengths[i] for s in sequences for i in s]

    def tiles(self, states: Tensor, head: Head, rows: int) -> KeptTiles:
        """A tile of `rows` tokens."""
        return KeptTiles(states, head, self.backend, rows, self.plan.columns, moments=self.moments)

    def differentiate(
        self, sums: Tensor, pairs: range, named: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses of consecutive pairs, and the whole loss's derivatives by their log-probabilities, chosen first.

        `named` are inputs of these pairs beside the call's.
        """
        with torch.enable_grad():
            leaf = sums.detach().requires_grad_()
            seen = self.inputs.pairs(leaf, pairs.start, pairs.stop)
            losses = pair_losses(self.objective, replace(seen, inputs={**seen.inputs, **(named or {})}))
            total = losses.sum() * self.loss_scale
            slopes = torch.autograd.grad(total, leaf) if total.requires_grad else (torch.zeros_like(leaf),)
        return losses.detach(), slopes[0]

    def differentiate_tokens(
        self, stats: TokenStats, labels: Tensor, weights: Tensor | None, lengths: list[int], pairs: range
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and sums of consecutive pairs, and the whole loss's derivatives by their tokens, chosen first."""
        logp = stats.logp
        if self.kernel is not None:
            return self.kernel.differentiate(logp, labels, lengths, pairs, self.loss_scale)
        repeats = torch.tensor(lengths, device=logp.device)
        sums = sum_segments(logp, repeats, weights)
        names = token_outputs_of(self.objective)
        named = by_side({name: sum_segments(getattr(stats, name), repeats) for name in names})
        losses, slopes = self.differentiate(sums, pairs, named)
        slopes = slopes.repeat_interleave(repeats)
        return losses, sums, slopes if weights is None else slopes * weights

    def count_metrics(self, stats: TokenStats, chosen: int) -> None:
        """Add a tile's tokens to the token metrics; the first `chosen` of them belong to chosen responses."""
        if stats.shifted_sum is None:
            return
        found = {
            "entropy": stats.entropy.sum(),
            "mean_token_accuracy": (stats.label_logit == stats.max)[:chosen].sum().float(),
        }
        for name, value in found.items():
            self.token_sums[name] = self.token_sums[name] + value


class ThreeProductFunction(torch.autograd.Function):
    """Loss and gradients together in the forward; the backward multiplies by the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: PairCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the reduced loss, losses `[B]` and sequence sums `[2B]`; the last two carry no gradient."""
        states = hidden.reshape(-1, hidden.shape[-1])
        head = Head(weight, bias, call.transform)
        wide = accumulator_dtype(hidden.dtype)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        # zero where no token counts; unscaled gradients wait in it
        grad_hidden = torch.zeros_like(states) if need_hidden else None
        grad = GradientSums(
            weight=in_huge_pages(weight.new_empty(weight.shape)) if need_weight else None,
            bias=weight.new_empty(weight.shape[0], dtype=wide) if need_bias else None,
        )
        run = _packed if call.plan.path == "packed" else _factorised
        with torch.autocast(hidden.device.type, enabled=False):
            losses, sums = run(states, head, call, grad, grad_hidden)
        ctx.gradients = (
            None if grad_hidden is None else grad_hidden.view(hidden.shape),
            grad.weight,
            grad.bias,
        )
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses, sums)
        return losses.sum() * call.loss_scale, losses, sums

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, multiplied in place."""
        if torch.is_grad_enabled():
            raise RuntimeError("fused_spo_loss does not support double backward (create_graph=True was passed)")
        if ctx.gradients is None:
            raise RuntimeError(
                "fused_spo_loss: the gradients of a loss computed in three products are given out once; "
                "to go backward through it again, pass path='two_pass'"
            )
        hidden, weight, bias = ctx.gradients
        # held here they would be copied, not taken over, by the parameter's .grad
        ctx.gradients = None
        for grad in (hidden, weight, bias):
            if grad is not None:
                grad.mul_(upstream)
        return hidden, weight, None if bias is None else bias.to(ctx.weight_dtype), None


def _accumulator(call: PairCall, grad: GradientSums) -> GradientSums:
    """Where the weight's gradient is summed: itself, or an accumulator beside it. Not written yet."""
    if grad.weight is None or not call.plan.sum_apart:
        return grad
    total = torch.empty_like(grad.weight, dtype=accumulator_dtype(grad.weight.dtype))
    return GradientSums(in_huge_pages(total), grad.bias)


def _packed(
    states: Tensor, head: Head, call: PairCall, grad: GradientSums, grad_hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Group by group: logits, the pairs' coefficients, and gradients from the same tile."""
    total = _accumulator(call, grad)
    groups = [(pairs, *call.select_pairs(pairs)) for pairs in call.plan.groups]
    largest = max((tokens.labels.numel() for _, tokens, _, _ in groups), default=0)
    tiles = call.tiles(states, head, largest)
    all_losses, all_sums = [], []
    for number, (pairs, tokens, weights, lengths) in enumerate(groups):

        def coefficients(
            stats: TokenStats,
            pairs: range = pairs,
            tokens: TokenRows = tokens,
            weights: Tensor | None = weights,
            lengths: list[int] = lengths,
        ) -> Tensor:
            losses, sums, slopes = call.differentiate_tokens(stats, tokens.labels, weights, lengths, pairs)
            all_losses.append(losses)
            all_sums.append(sums.view(2, -1))
            return slopes

        stats = tiles.run(tokens, coefficients, total, grad_hidden, accumulate=number > 0)
        call.count_metrics(stats, chosen=sum(lengths[: len(pairs)]))
    if grad.weight is not None and total.weight is not grad.weight and total.weight is not None:
        grad.weight.copy_(total.weight)
    return torch.cat(all_losses), torch.cat(all_sums, dim=1).flatten()


def _factorised(
    states: Tensor, head: Head, call: PairCall, grad: GradientSums, grad_hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pair by pair: unscaled gradients from tiles of whole-vocabulary rows, scaled once both sums are known."""
    total = _accumulator(call, grad)
    first = total
    if call.pairs > 1:
        total.zero_()
        first = _empty_like(total)
    margin = coupling_of(call.objective) == "margin"
    second = first if margin else _empty_like(total)
    rows = max(1, min(call.plan.rows, max(call.lengths, default=0)))
    tiles = call.tiles(states, head, rows)
    losses, sums = [], states.new_zeros(2 * call.pairs, dtype=accumulator_dtype(states.dtype))
    for pair in range(call.pairs):
        chosen, rejected = pair, call.pairs + pair
        sums[chosen] = _unscaled(tiles, call, chosen, 1.0, first, grad_hidden, fresh=True)
        sign = -1.0 if margin else 1.0
        sums[rejected] = _unscaled(tiles, call, rejected, sign, second, grad_hidden, fresh=not margin)
        loss, slopes = call.differentiate(sums[[chosen, rejected]], range(pair, pair + 1))
        losses.append(loss)
        if grad_hidden is not None:
            _scale_tokens_(grad_hidden, call, chosen, slopes[0])
            _scale_tokens_(grad_hidden, call, rejected, slopes[1] * sign)
        if first is total:
            first.scale_(slopes[0])
        else:
            total.add_(first, slopes[0])
        if not margin:
            total.add_(second, slopes[1])
    if grad.weight is not None and total.weight is not grad.weight and total.weight is not None:
        grad.weight.copy_(total.weight)
    return torch.cat(losses), sums


def _unscaled(
    tiles: KeptTiles,
    call: PairCall,
    sequence: int,
    sign: float,
    unscaled: GradientSums,
    grad_hidden: Tensor | None,
    *,
    fresh: bool,
) -> Tensor:
    """The sequence's log-probability; `sign` times its gradient into (`fresh`) or onto `unscaled`."""
    if fresh and call.lengths[sequence] == 0:
        unscaled.zero_()
    total = call.labels.new_zeros((), dtype=torch.float64)
    for start in range(call.bounds[sequence], call.bounds[sequence + 1], tiles.rows):
        stop = min(start + tiles.rows, call.bounds[sequence + 1])
        weights = 1.0 if call.token_weights is None else call.token_weights[start:stop]

        def coefficients(stats: TokenStats, weights: Tensor | float = weights) -> Tensor:
            return torch.full_like(stats.max, sign) * weights

        stats = tiles.run(call.select(start, stop), coefficients, unscaled, grad_hidden, accumulate=not fresh)
        total += (stats.logp * weights).sum()
        call.count_metrics(stats, chosen=stats.max.numel() if sequence < call.pairs else 0)
        fresh = False
    return total


def _empty_like(sums: GradientSums) -> GradientSums:
    return GradientSums(*(None if v is None else in_huge_pages(torch.empty_like(v)) for v in (sums.weight, sums.bias)))


def _scale_tokens_(grad_hidden: Tensor, call: PairCall, sequence: int, factor: Tensor) -> None:
    """Multiply the rows of one sequence's tokens; 1024 at a time bound the temporary."""
    for start in range(call.bounds[sequence], call.bounds[sequence + 1], 1024):
        rows = call.rows[start : min(start + 1024, call.bounds[sequence + 1])]
        grad_hidden[rows] = (grad_hidden[rows] * factor).to(grad_hidden.dtype)
