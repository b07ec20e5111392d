"""`FusedPreferenceModel`: backbone, head and preference loss in one forward."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spo_kernels import LMHead, fused_spo_loss
from spo_kernels.integrations.layout import LaidPairs, check_layout, lay_pairs
from spo_kernels.losses import Objective
from spo_kernels.losses.needs import needs_reference
from spo_kernels.losses.registry import resolve_objective

ADAPTERS_OFF = "adapters_off"
OPTIONS = ("sparsity", "workspace_bytes", "backend", "path", "token_metrics", "ignore_index")


class FusedPreferenceModel(nn.Module):
    """A causal language model whose forward returns a preference loss; logits are never materialised.

    Everything happens inside one forward, so that the hooks of DDP, FSDP and DeepSpeed see every use of a parameter:
    wrap this module, not the model inside. Under DDP a loss made of `ddp.module` lets the ranks drift apart without a
    word.

    Equivalent PyTorch, without the memory::

        logp = model(input_ids, attention_mask).logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None])
        chosen, rejected = (logp[..., 0] * (labels[:, 1:] != -100)).sum(-1).chunk(2)
        loss = objective(PairLogps(chosen, rejected, *ref_logps.chunk(2), ...)).mean()

    Args:
        model: A transformers causal language model, maybe inside PEFT.
        loss: A name in `spo_kernels.losses.LOSSES`, or an objective.
        reference: Where the reference's log-probabilities come from if a call brings none: "adapters_off" (the model
            with its PEFT adapters switched off), or another causal language model, which is put in evaluation mode and
            gets no gradient. It is no submodule: it is neither trained nor saved with this one.
        layout: How policy and reference compute a padded batch: "padded" as it is; "packed" without padding; "shared"
            also with each prompt once for all responses to it; "auto" shared where a comparison at the first batch
            finds the same hidden states, else padded, with one warning that says why. See docs/packing.md.
        accumulate: With gradient accumulation in one process: one `[V, H]` less, see `LMHead`.
        options: Keyword arguments of `fused_spo_loss` that are the same for each call, see `OPTIONS`.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """

    # the loss is a mean over this forward's pairs: transformers' Trainer divides it by the accumulation steps
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        loss: str | Objective = "dpo",
        reference: nn.Module | str | None = None,
        layout: str = "auto",
        accumulate: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        LMHead.of(model)
        check_layout(layout)
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise TypeError(f"FusedPreferenceModel takes no {', '.join(unknown)}; its options are {', '.join(OPTIONS)}")
        if reference == ADAPTERS_OFF and not hasattr(model, "disable_adapter"):
            raise ValueError(f'reference = "adapters_off" needs a PEFT model, got {type(model).__name__}')
        if isinstance(reference, str) and reference != ADAPTERS_OFF:
            raise ValueError(f'reference must be "adapters_off", a model or None, got {reference!r}')
        if isinstance(reference, nn.Module):
            LMHead.of(reference)
            reference.requires_grad_(False).eval()
        self.model = model
        self.objective = resolve_objective(loss)
        # in a tuple, so that torch registers no submodule
        self._reference = (reference,)
        self._layout = layout
        self._accumulate = accumulate
        self._options = {"ignore_index": -100, **options}
        self._needs_reference = needs_reference(self.objective)
        self._looked_at_labels = False

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        ref_logps: Tensor | None = None,
        pair_inputs: Mapping[str, Tensor] | None = None,
        token_weights: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of B pairs, chosen rows first.

        Args:
            input_ids: `[2B, T]`.
            labels: `[2B, T]`, not shifted, as transformers and TRL have them: `input_ids` where a token counts, -100 on
                prompt and padding.
            attention_mask: `[2B, T]`, as the model takes it.
            ref_logps: `[2B]` sums, or of tokens in labels' shape; see `fused_spo_loss`.
            pair_inputs, token_weights: As in `fused_spo_loss`.
            inputs: Further arguments of the model's forward.

        Returns:
            The mean loss over pairs, plus the model's auxiliary loss where its configuration asks for router logits;
            and metrics under TRL's names, detached.
        """
        self._look_at(labels, input_ids)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        laid = lay_pairs(self.model, labels, self._layout, ignore_index=self._options["ignore_index"], **inputs)
        reference = self._reference_inputs(laid) if ref_logps is None and self._needs_reference else {}
        hidden, output = laid.hidden(self.model)
        loss, metrics = fused_spo_loss(
            hidden,
            replace(LMHead.of(self.model), accumulate=self._accumulate),
            laid.labels,
            loss=self.objective,
            ref_logps=laid.of_tokens(ref_logps),
            pair_inputs=pair_inputs,
            token_weights=laid.of_tokens(token_weights),
            cu_seqlens=laid.cu_seqlens,
            shift=laid.shift,
            **reference,
            **self._options,
        )
        router_loss = getattr(output, "aux_loss", None)
        if isinstance(router_loss, Tensor):
            coefficient = self.config.get_text_config().router_aux_loss_coef
            loss = loss + coefficient * router_loss.to(loss.device)
            metrics["aux_loss"] = router_loss.detach()
        return loss, metrics

    @torch.no_grad()
    def _reference_inputs(self, laid: LaidPairs) -> dict[str, Any]:
        (reference,) = self._reference
        if reference is None:
            raise ValueError("the objective needs a reference: pass ref_logps, or make the module with reference=")
        model: Any = self.model if isinstance(reference, str) else reference
        training = model.training
        model.eval()
        try:
            with model.disable_adapter() if isinstance(reference, str) else nullcontext():
                hidden, _ = laid.hidden(model)
        finally:
            model.train(training)
        return {"ref_hidden": hidden, "ref_head": LMHead.of(model)}

    def _look_at(self, labels: Tensor, input_ids: Tensor) -> None:
        """Warn where labels are those of the next position: a loss of shifted labels is another model's."""
        if self._looked_at_labels or labels.shape != input_ids.shape:
            return
        self._looked_at_labels = True
        counted = labels != self._options["ignore_index"]
        own = (labels == input_ids)[counted].float().mean()
        following = (labels[:, :-1] == input_ids[:, 1:])[counted[:, :-1]].float().mean()
        if own < 0.5 < following:
            warnings.warn(
                "labels look shifted: they equal the next position's input_ids. This module shifts them itself; pass "
                "labels that stand where their tokens do",
                stacklevel=3,
            )
