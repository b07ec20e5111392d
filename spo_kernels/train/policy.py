"""The trained module: backbone and fused loss in one forward, so that a DDP wrapper sees every use.

Calling a part of a wrapped model from outside would bypass DDP's gradient hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from spo_kernels import Sparsity, fused_spo_loss, linear_logprob, sequence_logps
from spo_kernels.extras.token_weights import ld_dpo_weights
from spo_kernels.losses import Objective
from spo_kernels.losses.state import has_state
from spo_kernels.sparsity import EXACT
from spo_kernels.train.batches import IGNORE_INDEX
from spo_kernels.train.model import HeadlessModel


class Reference:
    """The reference model of an online run: a frozen copy, or the policy with its adapters off."""

    def __init__(self, headless: HeadlessModel, adapters_off: bool) -> None:
        self.headless, self.adapters_off = headless, adapters_off

    @torch.no_grad()
    def inputs(self, input_ids: Tensor) -> dict[str, Any]:
        """ref_hidden and ref_head for fused_spo_loss, without dropout."""
        model: Any = self.headless.model
        training = model.training
        model.eval()
        with model.disable_adapter() if self.adapters_off else nullcontext():
            hidden = self.headless.hidden(input_ids)
        model.train(training)
        return {"ref_hidden": hidden, "ref_head": self.headless.head}


def pair_token_weights(labels: Tensor, ld_alpha: float | None) -> Tensor | None:
    """What each token of a batch of pairs from `collate` counts in its response's log-prob; None: all the same."""
    return None if ld_alpha is None else ld_dpo_weights(labels, ld_alpha, ignore_index=IGNORE_INDEX, shift=True)


class Policy(nn.Module):
    """Forward returns (loss, metrics, pair_logps). The first two are *sums* over units: response tokens for sft,
    pairs otherwise; the last are the responses' log-probabilities [2B], detached, or None for sft.
    """

    def __init__(
        self,
        headless: HeadlessModel,
        objective: Objective | None = None,
        reference: Reference | None = None,
        ld_alpha: float | None = None,
        sparsity: Sparsity = EXACT,
        **kernel_options: Any,
    ) -> None:
        super().__init__()
        self._ld_alpha = ld_alpha
        self._sparsity = sparsity
        self.headless = headless
        self.objective = objective
        # Not a submodule: it must not be trained, saved, or switched to training mode with the policy.
        self._reference = (reference,)
        self._options = {
            **kernel_options,
            "shift": True,
            "ignore_index": IGNORE_INDEX,
        }

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        pair_inputs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """input_ids and labels [rows, T] from `collate`; ref_logps, [2B] or in labels' shape, unless the reference is
        online.
        """
        if self.objective is None:
            return *self._sft(input_ids, labels), None
        (reference,) = self._reference
        online = {} if reference is None or ref_logps is not None else reference.inputs(input_ids)
        hidden, router_loss = self.headless.hidden_and_router_loss(input_ids, labels)
        loss, metrics = fused_spo_loss(
            hidden,
            self.headless.head,
            labels,
            loss=self.objective,
            ref_logps=ref_logps,
            pair_inputs=pair_inputs,
            token_weights=pair_token_weights(labels, self._ld_alpha),
            reduction="sum",
            pair_logps=True,
            sparsity=self._next_sparsity(),
            **online,
            **self._options,
        )
        pair_logps = metrics.pop("pair_logps")
        chosen, rejected = pair_logps.chunk(2)
        # before training, policy and reference are equal and reward accuracy is rounding noise; this is not
        metrics["logps/accuracies"] = (chosen > rejected).float().mean()
        sums = {k: v * len(chosen) for k, v in metrics.items()}
        return *_add_router_loss(loss, sums, router_loss, len(chosen)), pair_logps

    def objective_state(self) -> dict[str, Any]:
        """Running statistics of the objective, where it has any."""
        return cast(Any, self.objective).state_dict() if has_state(self.objective) else {}

    def load_objective_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `objective_state` gave."""
        if state:
            cast(Any, self.objective).load_state_dict(state)

    def chosen_logps(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities [B] of the chosen responses of pairs, as the objective sees them; differentiable.

        Only the chosen rows are computed.
        """
        rows = len(labels) // 2
        weights = pair_token_weights(labels, self._ld_alpha)
        # without the padding that only rejected responses need
        length = max((labels[:rows] != IGNORE_INDEX).any(0).nonzero().flatten().tolist(), default=0) + 1
        input_ids, labels = input_ids[:rows, :length], labels[:rows, :length]
        return sequence_logps(
            self.headless.hidden(input_ids),
            self.headless.head,
            labels,
            token_weights=None if weights is None else weights[:rows, :length],
            **self._options,
        )

    @torch.no_grad()
    def log_ratios(self, input_ids: Tensor, labels: Tensor, ref_logps: Tensor | None = None) -> Tensor:
        """`log πθ(y|x) - log πref(y|x)` of rows, [rows]; `ref_logps` [rows] unless the reference is online."""
        logps = sequence_logps(self.headless.hidden(input_ids), self.headless.head, labels, **self._options)
        if ref_logps is None:
            (reference,) = self._reference
            assert reference is not None
            model = reference.inputs(input_ids)
            ref_logps = sequence_logps(model["ref_hidden"], model["ref_head"], labels, **self._options)
        return logps - ref_logps

    def _sft(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        sparsity = self._next_sparsity()
        sparse = sparsity.mode != "exact"
        hidden, router_loss = self.headless.hidden_and_router_loss(input_ids, labels)
        logp, extra = linear_logprob(
            hidden,
            self.headless.head,
            labels,
            outputs=("correct", "kept_share", "dropped_mass") if sparse else ("correct",),
            sparsity=sparsity,
            **self._options,
        )
        sums = {"mean_token_accuracy": extra["correct"].sum().float()}
        if sparse:
            sums |= {
                "sparsity/kept": extra["kept_share"].sum(),
                "sparsity/dropped_mass_mean": extra["dropped_mass"].sum(),
            }
        units = (labels[:, 1:] != IGNORE_INDEX).sum()
        return _add_router_loss(-logp.sum(), sums, router_loss, units)

    def _next_sparsity(self) -> Sparsity:
        """With a seed of its own for every batch, from torch's generator: checkpoints keep that one's state."""
        if not self.training:
            return EXACT
        if self._sparsity.mode != "unbiased":
            return self._sparsity
        return replace(self._sparsity, seed=int(torch.randint(2**62, ())))


def _add_router_loss(
    loss: Tensor, sums: dict[str, Tensor], router_loss: Tensor | None, units: int | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch's auxiliary loss weighs as much as the batch has units, so that their mean is over all batches."""
    if router_loss is not None:
        loss = loss + router_loss * units
        sums = {**sums, "router_loss": router_loss.detach() * units}
    return loss, {**sums, "loss": loss.detach()}
