"""Functions called inside a model's forward, in the place of its head.

Trainers wrap the model that they were given: in DDP, FSDP, DeepSpeed. What is computed inside the wrapped forward is
seen by the wrappers' hooks; what is computed from the model's weights afterwards is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, cast

from torch import Tensor, nn

from spo_kernels.engine.inputs import why_not_accumulate
from spo_kernels.head import LMHead, inner_model
from spo_kernels.integrations.hidden import Run
from spo_kernels.integrations.layout import lay_pairs
from spo_kernels.integrations.layout.batch import LaidPairs
from spo_kernels.integrations.wrappers import Sealed, opened
from spo_kernels.logprob import linear_logprob
from spo_kernels.losses import Objective
from spo_kernels.sequences import sequence_logps

# from the model, what runs in its place, and the inputs of its forward
AtHead = Callable[[nn.Module, Run, dict[str, Any]], dict[str, Tensor]]
_MARK = "_spo_kernels_at_head"


def add_at_head(model: nn.Module) -> None:
    """Let `model(..., at_head=f)` return what `f` makes of its forward; without `at_head` it does what it did.

    Args:
        model: A transformers causal language model, maybe inside PEFT. Called again, this changes nothing.
    """
    inner = inner_model(model)
    if getattr(inner, _MARK, False):
        return
    original = inner.forward

    # the signature stays: `generate` and `Trainer` look at it
    @functools.wraps(type(inner).forward)
    def forward(self: nn.Module, *args: Any, at_head: AtHead | Sealed | None = None, **kwargs: Any) -> Any:
        # a deep copy's forward would run this model's weights
        if getattr(original, "__self__", self) is not self:
            raise RuntimeError(
                f"this {type(self).__name__} is a deep copy of a model that a trainer has changed, and would run that "
                "one's weights: copy a model before it is given to a trainer, or load it from where it was saved"
            )
        if at_head is None:
            return original(*args, **kwargs)
        # PEFT names them, without a value
        kwargs = {name: value for name, value in kwargs.items() if name not in ("use_cache", "labels")}
        return opened(at_head)(self, functools.partial(original, *args), kwargs)

    inner.forward = MethodType(forward, inner)
    setattr(inner, _MARK, True)


@dataclass(frozen=True)
class OfPairs:
    """What an `at_head` of a padded batch of pairs knows beside the model's inputs.

    A forward that mixed precision may wrap is to be given it `Sealed`: FSDP opens dataclasses and rounds what floats.

    Attributes:
        labels: `[2B, T]`, not shifted, chosen rows first.
        token_weights: Of the same shape, or None.
        layout: As in `FusedPreferenceModel`.
        options: Of `fused_spo_loss` and `linear_logprob`: workspace_bytes.
    """

    labels: Tensor
    token_weights: Tensor | None = None
    layout: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)

    def lay(self, model: nn.Module, run: Run, inputs: Mapping[str, Any]) -> LaidPairs:
        """The batch as the layout says."""
        return lay_pairs(model, self.labels, self.layout, run=run, **inputs)

    def real_tokens(self, hidden: Tensor, laid: LaidPairs) -> Tensor:
        """Without the virtual tokens that prompt-learning adapters put before the others of a padded batch."""
        return hidden if laid.row is not None else hidden[:, hidden.shape[1] - self.labels.shape[1] :]


@dataclass(frozen=True)
class ResponseLogps(OfPairs):
    """Log-probabilities of the labels: of each token, shaped like labels, or `summed` `[2B]` and weighted."""

    summed: bool = True

    def __call__(self, model: nn.Module, run: Run, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """`{"logps": ...}`."""
        laid = self.lay(model, run, inputs)

        def at_head(hidden: Tensor) -> Tensor:
            hidden, head = self.real_tokens(hidden, laid), LMHead.of(model)
            if not self.summed:
                logps = linear_logprob(hidden, head, laid.labels, shift=laid.shift, **self.options)
                return laid.padded(cast(Tensor, logps))
            return sequence_logps(
                hidden,
                head,
                laid.labels,
                token_weights=laid.of_tokens(self.token_weights),
                cu_seqlens=laid.cu_seqlens,
                shift=laid.shift,
                **self.options,
            )

        logps, _ = laid.to_head(model, at_head, run)
        return {"logps": logps}


@dataclass(frozen=True)
class PairLoss(OfPairs):
    """`fused_spo_loss` of the pairs.

    Attributes:
        objective, ref_logps, pair_inputs: As `fused_spo_loss` takes them.
        accumulate: As in `LMHead`, where nothing stands against it.
    """

    objective: Objective = field(kw_only=True)
    ref_logps: Tensor | None = None
    pair_inputs: Mapping[str, Tensor] | None = None
    accumulate: bool = False

    def __call__(self, model: nn.Module, run: Run, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """`{"loss": ...}` with its gradient, metrics, and the router's "aux_loss" where the model gives one."""
        laid = self.lay(model, run, inputs)

        def at_head(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            head = LMHead.of(model)
            return laid.loss(
                self.real_tokens(hidden, laid),
                replace(head, accumulate=self.accumulate and why_not_accumulate(head.weight) is None),
                loss=self.objective,
                ref_logps=self.ref_logps,
                pair_inputs=self.pair_inputs,
                token_weights=self.token_weights,
                token_metrics=True,
                **self.options,
            )

        (loss, metrics), output = laid.to_head(model, at_head, run)
        found = {**metrics, "loss": loss}
        router_loss = getattr(output, "aux_loss", None)
        return found if router_loss is None else {**found, "aux_loss": router_loss}
