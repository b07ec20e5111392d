"""What TRL asks of its fused LM head, answered by `linear_logprob`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from spo_kernels.head import LMHead
from spo_kernels.logprob import linear_logprob

# per-token outputs beside log-probabilities, as TRL names and orders them
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_OURS = {"entropy": "entropy", "log_sum_sq_probs": "log_sum_p2", "is_top1": "correct", "mean_logits": "mean_logit"}


class FusedHead:
    """Stands in the place of TRL's autograd function, and is called as that is."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities of `targets` and the optional outputs, None where not asked for.

        As in TRL, gradients flow from log-probabilities and entropy only. `chunk_size` is TRL's tile; the tiles here
        follow the workspace.

        Args:
            hidden: `[N, H]` last hidden states.
            weight: `[V, H]`.
            bias: `[V]` or None.
            targets: `[N]` token ids, none to be ignored.
            temperature: Divides the logits after scale and softcap.
            chunk_size: Not used.
            final_logit_softcapping: Softcap of the logits, or None.
            logit_scale: Multiplies the products before the softcap.
            outputs: Names of `OPTIONAL_OUTPUTS`; others mean nothing.

        Raises:
            RuntimeError: The head is partitioned by DeepSpeed ZeRO-3.
        """
        head = _head(hidden, weight, bias, temperature, final_logit_softcapping, logit_scale)
        wanted = [ours for name, ours in _OURS.items() if name in outputs]
        found = linear_logprob(hidden, head, targets, outputs=wanted)
        logp, extras = cast("tuple[Tensor, dict[str, Tensor]]", found if wanted else (found, {}))
        log_sum_p2 = extras.get("log_sum_p2")
        return (
            logp,
            extras.get("entropy"),
            None if log_sum_p2 is None else log_sum_p2.detach(),
            extras.get("mean_logit"),
            extras.get("correct"),
        )


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None, scale: float
) -> LMHead:
    """The head in hidden's dtype, its scale s and softcap c divided by the temperature: `c tanh(s x / c) / T` is that.

    Raises:
        RuntimeError: The head is partitioned.
    """
    if hasattr(weight, "ds_id"):
        raise RuntimeError(
            "the head's weight is partitioned by DeepSpeed ZeRO-3, which takes it away between forward and backward: "
            "patch_trl() cannot be used with it; call unpatch_trl() for TRL's own head, or choose another ZeRO stage"
        )
    # with TRL's cast_lm_head_to_fp32 only hidden comes in float32; autocast casts all three
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
    return LMHead(
        weight,
        bias,
        logit_scale=scale / temperature,
        logit_softcap=None if softcap is None else softcap / temperature,
    )
