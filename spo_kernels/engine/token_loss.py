"""A loss that is a sum over tokens, in three products: each group of tokens keeps its tile until its loss is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spo_kernels.backends.contract import Backend, TokenStats
from spo_kernels.backends.registry import load_backend
from spo_kernels.engine.checks import is_traced
from spo_kernels.engine.early import EarlyWork, Made, why_not_early
from spo_kernels.engine.gradients import HeadGradient
from spo_kernels.engine.inputs import Execution, ModelInputs
from spo_kernels.engine.kept import KeptTiles
from spo_kernels.engine.kept_space import KeptShape, KeptSpace, plan_groups
from spo_kernels.engine.token_rows import TokenRows
from spo_kernels.engine.tokens import Tokens
from spo_kernels.engine.workspace import spans

# one value a dimension of the labels
Index = tuple[Tensor, ...]
# log-probabilities [n] and the places of their labels to losses [n]
TokenLoss = Callable[[Tensor, Index], Tensor]


def token_losses(token_loss: TokenLoss, logp: Tensor, at: Index) -> Tensor:
    """What the caller's function gives, checked.

    Raises:
        TypeError, ValueError: It gives no loss for each token.
    """
    losses = token_loss(logp, at)
    if not isinstance(losses, Tensor):
        raise TypeError(f"token_loss must return a tensor, got {type(losses).__name__}")
    if losses.shape != logp.shape:
        raise ValueError(
            f"token_loss must return one loss for each of {logp.numel()} tokens, {list(logp.shape)}, "
            f"got {list(losses.shape)}"
        )
    return losses


def early_token_loss(
    model: ModelInputs, tokens: Tokens, shift: bool, execution: Execution, token_loss: TokenLoss
) -> tuple[Tensor, Tensor] | None:
    """The loss, differentiable once, and log-probabilities in labels' shape; None where it takes two passes."""
    if not model.trains_head or is_traced(tokens.labels) or why_not_early(model) is not None:
        return None
    backend, head = load_backend(execution.backend), model.slices()
    rows = TokenRows.of(tokens, shift, head.first)
    if rows.count == 0:
        return None
    space = KeptSpace.of(model.hidden, head, backend, execution.workspace_bytes, adds_to_grad=model.adds_to_grad)
    plan = plan_groups(space, rows.count, 1, lambda most: list(_ranges(rows.count, most)), space.least_rows)
    if plan is None:
        return None
    making = _Making(model, rows, tokens.labels.shape, backend, *plan, token_loss)
    work = EarlyWork(
        name="linear_token_loss",
        again="take the loss of linear_logprob",
        head=head,
        backend=backend,
        wide=model.wide,
        tokens=rows,
        scale=1.0,
        make=making.gradients,
        adds_to_grad=model.adds_to_grad,
    )
    loss, _, logp = work.run(model)
    return loss, rows.spread(logp, tokens.labels.shape)


def _index(places: Tensor, shape: torch.Size) -> Index:
    """Flat places as an index; torch.unravel_index would bring the shape from the host."""
    found: list[Tensor] = []
    for size in reversed(shape):
        found.append(places % size)
        places = places // size
    return tuple(reversed(found))


def _ranges(tokens: int, most: int) -> Sequence[range]:
    return [range(part.start, part.stop) for part in spans(tokens, most)]


@dataclass(frozen=True)
class _Making:
    """Of one call."""

    model: ModelInputs
    tokens: TokenRows
    shape: torch.Size  # of the labels
    backend: Backend
    groups: Sequence[range]
    tile: KeptShape
    token_loss: TokenLoss
    depends: list[bool] = field(default_factory=list)  # of each group's losses, on its log-probabilities

    def gradients(self, head_out: HeadGradient | None, grad_hidden: Tensor | None) -> Made:
        """Losses and log-probabilities of the tokens; see `EarlyWork.make`."""
        hidden, total = self.model.hidden.reshape(-1, self.model.hidden.shape[-1]), head_out
        if head_out is not None and self.tile.sum_apart:
            total = head_out.accumulator(self.model.wide)
        tiles = KeptTiles(hidden, self.model.slices(), self.backend, self.tile, moments=False)
        losses, logps = [], []
        for group in self.groups:
            tokens = self.tokens if len(self.groups) == 1 else self.tokens.part(group.start, group.stop)

            def coefficients(stats: TokenStats, group: range = group, tokens: TokenRows = tokens) -> Tensor:
                logp = tokens.masked(stats.logp)
                found, slopes = self._differentiate(logp, group)
                logps.append(logp)
                losses.append(tokens.masked(found))
                return tokens.masked(slopes)

            tiles.run(tokens, coefficients, total, grad_hidden, accumulate=group.start > 0)
        if not any(self.depends):
            raise ValueError("token_loss gave losses that do not depend on the log-probabilities: no gradient follows")
        if head_out is not None and total is not None:
            head_out.copy_(total)
        return Made(torch.cat(losses), torch.cat(logps), tiles.left)

    def _differentiate(self, logp: Tensor, group: range) -> tuple[Tensor, Tensor]:
        """The losses of a group's tokens, and each one's derivative.

        Raises:
            ValueError: Something else has a gradient of them, which would be lost.
        """
        places, part = self.tokens.places, (group.start, group.stop)
        places = torch.arange(*part, device=logp.device) if places is None else places[slice(*part)]
        with torch.enable_grad():
            leaf = logp.detach().requires_grad_()
            losses = token_losses(self.token_loss, leaf, _index(places, self.shape))
            self.depends.append(losses.requires_grad)
            if not losses.requires_grad:
                return losses, torch.zeros_like(leaf)
            _check_leaves(losses, leaf)
            (slopes,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), slopes


def _check_leaves(losses: Tensor, leaf: Tensor) -> None:
    ahead, seen = [losses.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", leaf) is not leaf:
            raise ValueError(
                "token_loss uses a tensor that requires a gradient, which would be lost: detach it, or take the loss "
                "of linear_logprob"
            )
        ahead.extend(parent for parent, _ in node.next_functions)
