"""Functions called inside a model's forward, in the place of its head.

Trainers wrap the model that they were given: in DDP, FSDP, DeepSpeed. What is computed inside the wrapped forward is
seen by the wrappers' hooks; what is computed from the model's weights afterwards is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, cast

from torch import Tensor, nn

from spo_kernels.head import LMHead, inner_model
from spo_kernels.integrations.hidden import forward_without_logits
from spo_kernels.logprob import linear_logprob
from spo_kernels.loss import fused_spo_loss
from spo_kernels.losses import Objective
from spo_kernels.sequences import sequence_logps

# from last hidden states [rows, T, H], the head, and the model's output
AtHead = Callable[[Tensor, LMHead, Any], dict[str, Tensor]]
_MARK = "_spo_kernels_at_head"


def add_at_head(model: nn.Module) -> None:
    """Let `model(..., at_head=f)` return `f(hidden, head, output)`; without `at_head` it does what it did.

    Args:
        model: A transformers causal language model, maybe inside PEFT. Called again, this changes nothing.
    """
    inner = inner_model(model)
    if getattr(inner, _MARK, False):
        return
    original = inner.forward

    # the signature stays: `generate` and `Trainer` look at it
    @functools.wraps(type(inner).forward)
    def forward(self: nn.Module, *args: Any, at_head: AtHead | None = None, **kwargs: Any) -> Any:
        if at_head is None:
            return original(*args, **kwargs)
        kwargs.pop("use_cache", None)
        hidden, output = forward_without_logits(self, functools.partial(original, *args), **kwargs)
        return at_head(hidden, LMHead.of(self), output)

    inner.forward = MethodType(forward, inner)
    setattr(inner, _MARK, True)


@dataclass(frozen=True)
class TokenLogps:
    """Log-probabilities of the labels: of each token, shaped like labels, or the `[rows]` sums of those weighted.

    No dataclass of this module is opened by FSDP, which would round its tensors to the model's precision.
    """

    labels: Tensor
    summed: bool = False
    token_weights: Tensor | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, hidden: Tensor, head: LMHead, output: Any) -> dict[str, Tensor]:
        """`{"logps": ...}`."""
        hidden = _real_tokens(hidden, self.labels)
        if self.summed:
            weights = self.token_weights
            sums = sequence_logps(hidden, head, self.labels, shift=True, token_weights=weights, **self.options)
            return {"logps": sums}
        return {"logps": cast(Tensor, linear_logprob(hidden, head, self.labels, shift=True, **self.options))}


@dataclass(frozen=True)
class PreferenceLoss:
    """`fused_spo_loss` of pairs, its metrics, and the router's loss."""

    objective: Objective
    labels: Tensor
    ref_logps: Tensor | None
    pair_inputs: Mapping[str, Tensor] | None
    token_weights: Tensor | None
    options: Mapping[str, Any]

    def __call__(self, hidden: Tensor, head: LMHead, output: Any) -> dict[str, Tensor]:
        """ "loss" with its gradient, the rest detached."""
        hidden = _real_tokens(hidden, self.labels)
        loss, metrics = fused_spo_loss(
            hidden,
            head,
            self.labels,
            loss=self.objective,
            ref_logps=self.ref_logps,
            pair_inputs=self.pair_inputs,
            token_weights=self.token_weights,
            shift=True,
            token_metrics=True,
            **self.options,
        )
        found = {**metrics, "loss": loss}
        router_loss = getattr(output, "aux_loss", None)
        return found if router_loss is None else {**found, "aux_loss": router_loss}


def _real_tokens(hidden: Tensor, labels: Tensor) -> Tensor:
    """Without the virtual tokens that prompt-learning adapters put before the others."""
    return hidden[:, hidden.shape[1] - labels.shape[1] :]
