"""The trained module of each stage: what the loop adds to `FusedPreferenceModel`, and its counterpart for sft.

Both sum over units, since accumulation and processes make means of their own, and take no attention mask, see
`collate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spo_kernels import LMHead, Sparsity, linear_logprob, sequence_logps
from spo_kernels.integrations.hidden import forward_without_logits, hidden_states
from spo_kernels.integrations.layout import LaidPairs
from spo_kernels.integrations.preference_model import FusedPreferenceModel
from spo_kernels.losses import Objective
from spo_kernels.sparsity import EXACT, of_next_batch
from spo_kernels.train.batches import IGNORE_INDEX
from spo_kernels.train.experts import router_loss

# what a policy's forward gives: loss, metrics, log-probabilities [2B] of the responses of pairs
Found = tuple[Tensor, dict[str, Tensor], Tensor | None]


class Policy(FusedPreferenceModel):
    """Forward returns (loss, metrics, pair_logps): *sums* over pairs, and the responses' log-probabilities [2B].

    See `FusedPreferenceModel` for the arguments; `kernels` are workspace_bytes and backend.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Objective,
        reference: nn.Module | str | None = None,
        ld_alpha: float | None = None,
        sparsity: Sparsity = EXACT,
        layout: str = "auto",
        accumulate: bool = False,
        **kernels: Any,
    ) -> None:
        own: dict[str, Any] = {"layout": layout, "accumulate": accumulate, "ld_alpha": ld_alpha, "sparsity": sparsity}
        super().__init__(model, loss, reference, **own, reduction="sum", pair_logps=True, **kernels)
        self._kernels = {**kernels, "shift": True, "ignore_index": IGNORE_INDEX}
        self._experts = router_loss(model)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        pair_inputs: Mapping[str, Tensor] | None = None,
    ) -> Found:
        """input_ids and labels [2B, T] from `collate`; ref_logps, [2B] or in labels' shape, unless the reference is
        online.
        """
        loss, metrics = super().forward(input_ids, labels=labels, ref_logps=ref_logps, pair_inputs=pair_inputs)
        pair_logps = metrics.pop("pair_logps")
        chosen, rejected = pair_logps.chunk(2)
        # before training, policy and reference are equal and reward accuracy is rounding noise; this is not
        metrics["logps/accuracies"] = (chosen > rejected).float().mean()
        if self._experts is not None:
            metrics["router_loss"] = self._experts.coefficient * metrics.pop("aux_loss")
        sums = {name: value * len(chosen) for name, value in metrics.items()}
        return loss, {**sums, "loss": loss.detach()}, pair_logps

    def chosen_logps(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities [B] of the chosen responses of pairs, as the objective sees them; differentiable.

        Only the chosen rows are computed.
        """
        rows = len(labels) // 2
        weights = self._token_weights(labels)
        # without the padding that only rejected responses need
        length = max((labels[:rows] != IGNORE_INDEX).any(0).nonzero().flatten().tolist(), default=0) + 1
        return sequence_logps(
            hidden_states(self.model, input_ids=input_ids[:rows, :length]),
            LMHead.of(self.model),
            labels[:rows, :length],
            token_weights=None if weights is None else weights[:rows, :length],
            **self._kernels,
        )

    @torch.no_grad()
    def log_ratios(self, input_ids: Tensor, labels: Tensor, ref_logps: Tensor | None = None) -> Tensor:
        """`log πθ(y|x) - log πref(y|x)` of rows, [rows]; `ref_logps` [rows] unless the reference is online."""
        inputs = {"input_ids": input_ids}
        logps = sequence_logps(hidden_states(self.model, **inputs), LMHead.of(self.model), labels, **self._kernels)
        if ref_logps is None:
            model = self._reference_inputs(LaidPairs(inputs, labels))
            ref_logps = sequence_logps(model["ref_hidden"], model["ref_head"], labels, **self._kernels)
        return logps - ref_logps

    def _router_loss(self, output: Any, labels: Tensor) -> Tensor | None:
        """Without padding, of which the model knows nothing."""
        return None if self._experts is None else self._experts(output.router_logits, labels)


class SFTPolicy(nn.Module):
    """Forward returns (loss, metrics, None): *sums* over response tokens."""

    objective = None

    def __init__(self, model: nn.Module, sparsity: Sparsity = EXACT, **kernels: Any) -> None:
        super().__init__()
        self.model = model
        self._sparsity = sparsity
        self._kernels = {**kernels, "shift": True, "ignore_index": IGNORE_INDEX}
        self._experts = router_loss(model)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Found:
        """input_ids and labels [B, T] from `collate`."""
        sparsity = of_next_batch(self._sparsity, self.training)
        sparse = sparsity.mode != "exact"
        hidden, output = forward_without_logits(self.model, input_ids=input_ids)
        logp, extra = linear_logprob(
            hidden,
            LMHead.of(self.model),
            labels,
            outputs=("correct", "kept_share", "dropped_mass") if sparse else ("correct",),
            sparsity=sparsity,
            **self._kernels,
        )
        loss = -logp.sum()
        sums = {"mean_token_accuracy": extra["correct"].sum().float()}
        if sparse:
            sums |= {
                "sparsity/kept": extra["kept_share"].sum(),
                "sparsity/dropped_mass_mean": extra["dropped_mass"].sum(),
            }
        if self._experts is not None:
            # it weighs as much as the batch has units, so that the mean is over all batches
            units = (labels[:, 1:] != IGNORE_INDEX).sum()
            of_routers = self._experts.coefficient * self._experts(output.router_logits, labels) * units
            loss, sums["router_loss"] = loss + of_routers, of_routers.detach()
        return loss, {**sums, "loss": loss.detach()}, None
