"""`FusedPreferenceModel`: backbone, head and preference loss in one forward."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spo_kernels import LMHead
from spo_kernels.extras.token_weights import ld_dpo_weights
from spo_kernels.integrations.layout import LaidPairs, check_layout, lay_pairs
from spo_kernels.integrations.modes import evaluating
from spo_kernels.integrations.tied import one_gradient
from spo_kernels.integrations.wrappers import ddp_around, inside_ddp, opened, sealed
from spo_kernels.losses import Objective
from spo_kernels.losses.needs import needs_reference
from spo_kernels.losses.registry import resolve_objective
from spo_kernels.sparsity import Sparsity, as_sparsity, of_next_batch

ADAPTERS_OFF = "adapters_off"
OPTIONS = ("workspace_bytes", "backend", "path", "token_metrics", "pair_logps", "reduction", "ignore_index")


class FusedPreferenceModel(nn.Module):
    """A causal language model whose forward returns a preference loss, without full logits.

    Everything happens inside one forward, so that the hooks of DDP, FSDP and DeepSpeed see every use of a parameter:
    wrap this module, not the model inside. A call with gradients that goes around DDP would let the ranks drift apart;
    it is refused.

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
        accumulate: In one process: gradients of the head are added to the one that exists, see `LMHead`, and those of a
            tied embedding too. One `[V, H]` less with gradient accumulation, two where they are tied.
        ld_alpha: The α of `ld_dpo_weights`, which are then the token weights of every call that brings none. Sums in
            `ref_logps` are taken as they are: make them with the same α, as `precompute_ref_logps` can.
        sparsity: As in `fused_spo_loss`, for training; each forward of "unbiased" has a seed of its own, from torch's
            generator. In evaluation mode everything is exact.
        options: Further keyword arguments of `fused_spo_loss` that are the same for each call, see `OPTIONS`.

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
        ld_alpha: float | None = None,
        sparsity: str | Sparsity = "exact",
        **options: Any,
    ) -> None:
        super().__init__()
        LMHead.of(model)
        check_layout(layout)
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            known = ", ".join(("layout", "accumulate", "ld_alpha", "sparsity", *OPTIONS))
            raise TypeError(f"FusedPreferenceModel takes no {', '.join(unknown)}; its options are {known}")
        if reference == ADAPTERS_OFF and not hasattr(model, "disable_adapter"):
            raise ValueError(f'reference = "adapters_off" needs a PEFT model, got {type(model).__name__}')
        if not (reference is None or reference == ADAPTERS_OFF or isinstance(reference, nn.Module)):
            raise ValueError(f'reference must be "adapters_off", a model or None, got {reference!r}')
        if reference is model:
            raise ValueError("reference is the model itself, which it would freeze: pass a copy that is not trained")
        if isinstance(reference, nn.Module):
            LMHead.of(reference)
            reference.requires_grad_(False).eval()
        self.model = model
        self.objective = resolve_objective(loss)
        # in a tuple, so that torch registers no submodule
        self._reference = (reference,)
        self._ld_alpha, self._sparsity = ld_alpha, as_sparsity(sparsity)
        self._layout = layout
        self._accumulate = accumulate
        self._options = {"ignore_index": -100, **options}
        self._needs_reference = needs_reference(self.objective)
        self._looked_at_labels = self._looked_for_ddp = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, with the numbers of pairs as exact as they come."""
        return super().__call__(*args, **sealed(kwargs, ("ref_logps", "pair_inputs", "token_weights")))

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def forward(
        self,
        input_ids: Tensor,
        *,
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
            ref_logps: `[2B]` sums, or of tokens in labels' shape; see `fused_spo_loss`. Not beside `reference`.
            pair_inputs, token_weights: As in `fused_spo_loss`.
            inputs: Further arguments of the model's forward.

        Returns:
            The mean loss over pairs (their sum with reduction="sum"), plus for each pair the model's auxiliary loss
            where its configuration asks for router logits; and metrics under TRL's names, detached.
        """
        self._refuse_bypass()
        self._look_at(labels, input_ids, attention_mask)
        ref_logps, pair_inputs, token_weights = opened(ref_logps), opened(pair_inputs), opened(token_weights)
        if ref_logps is not None:
            if self._reference != (None,):
                raise ValueError("pass either ref_logps or, where the module is made, reference=, not both")
            _check_ref_logps(ref_logps, labels)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        laid = lay_pairs(self.model, labels, self._layout, ignore_index=self._options["ignore_index"], **inputs)
        reference = self._reference_inputs(laid) if ref_logps is None and self._needs_reference else {}
        weights = self._token_weights(labels) if token_weights is None else token_weights

        def at_head(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return laid.loss(
                hidden,
                replace(LMHead.of(self.model), accumulate=self._accumulate),
                loss=self.objective,
                ref_logps=ref_logps,
                pair_inputs=pair_inputs,
                token_weights=weights,
                sparsity=of_next_batch(self._sparsity, self.training),
                **reference,
                **self._options,
            )

        with one_gradient(self.model) if self._accumulate else nullcontext():
            (loss, metrics), output = laid.to_head(self.model, at_head)
        router_loss = self._router_loss(output, labels)
        if router_loss is not None:
            coefficient = self.config.get_text_config().router_aux_loss_coef
            weight = len(labels) // 2 if self._options.get("reduction") == "sum" else 1
            loss = loss + coefficient * router_loss.to(loss.device) * weight
            metrics["aux_loss"] = router_loss.detach()
        return loss, metrics

    def _router_loss(self, output: Any, labels: Tensor) -> Tensor | None:
        """Of a mixture of experts; the model computes it where its configuration asks for router logits."""
        found = getattr(output, "aux_loss", None)
        return found if isinstance(found, Tensor) else None

    def _token_weights(self, labels: Tensor) -> Tensor | None:
        ignored = self._options["ignore_index"]
        return (
            None if self._ld_alpha is None else ld_dpo_weights(labels, self._ld_alpha, ignore_index=ignored, shift=True)
        )

    @torch.no_grad()
    def _reference_inputs(self, laid: LaidPairs) -> dict[str, Any]:
        (reference,) = self._reference
        if reference is None:
            raise ValueError("the objective needs a reference: pass ref_logps, or make the module with reference=")
        model: Any = self.model if isinstance(reference, str) else reference
        with evaluating(model), model.disable_adapter() if isinstance(reference, str) else nullcontext():
            hidden, head = laid.hidden(model)[0], LMHead.of(model)
        return {"ref_hidden": hidden, "ref_head": head}

    def _refuse_bypass(self) -> None:
        if self._looked_for_ddp or not torch.is_grad_enabled() or inside_ddp():
            return
        if ddp_around(self) is not None:
            raise RuntimeError(
                "the forward of a module that DistributedDataParallel wraps was called with gradients and not through "
                "the wrapper: they would not be averaged, and the ranks would drift apart; call the wrapper"
            )
        self._looked_for_ddp = True

    def _look_at(self, labels: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Warn where labels are those of the next position, a loss of another model, or of padding."""
        if self._looked_at_labels or labels.shape != input_ids.shape:
            return
        self._looked_at_labels = True
        counted = labels != self._options["ignore_index"]
        own = (labels == input_ids)[counted].float().mean()
        following = (labels[:, :-1] == input_ids[:, 1:])[counted[:, :-1]].float().mean()
        if not counted.any():
            warnings.warn(
                f"no label counts in this batch: all are {self._options['ignore_index']}, so that nothing is trained",
                stacklevel=3,
            )
        if own < 0.5 < following:
            warnings.warn(
                "labels look shifted: they equal the next position's input_ids. This module shifts them itself; pass "
                "labels that stand where their tokens do",
                stacklevel=3,
            )
        if attention_mask is not None and attention_mask.shape == labels.shape and counted[attention_mask == 0].any():
            warnings.warn(
                "labels count where attention_mask is 0: a padded batch scores them, a row without padding does not; "
                f"pass {self._options['ignore_index']} there",
                stacklevel=3,
            )


def _check_ref_logps(ref_logps: Tensor, labels: Tensor) -> None:
    """In the caller's shapes: in a row without padding, those of the loss are others."""
    if ref_logps.shape not in (labels.shape[:1], labels.shape):
        raise ValueError(
            f"ref_logps must have shape {list(labels.shape[:1])} or {list(labels.shape)}, got {list(ref_logps.shape)}"
        )
