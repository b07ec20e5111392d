"""What a batch is compared with: log-probabilities that the caller has, or a model that is evaluated here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.engine.autograd import LogprobCall
from spo_kernels.engine.checks import check_vector
from spo_kernels.engine.inputs import Execution, ModelInputs
from spo_kernels.engine.label_layout import LabelLayout
from spo_kernels.engine.tokens import Tokens
from spo_kernels.preference.given import Given


@dataclass(frozen=True)
class Reference:
    """One of them, or neither; its weights are checked, and constants."""

    model: ModelInputs | None
    token_logps: Tensor | None  # as given, labels' shape
    sums: Tensor | None  # as given, [2B]
    weights: Tensor | None  # of its tokens, where they are not the policy's

    @classmethod
    def resolve(cls, given: Given, policy: Given, layout: LabelLayout) -> Reference:
        """Check what was given.

        Raises:
            TypeError, ValueError, RuntimeError: It is wrong; the message names the argument.
        """
        of_tokens = _are_of_tokens(given.logps, layout)
        return cls(
            model=_model(given, policy, layout.labels, of_tokens),
            token_logps=given.logps if of_tokens else None,
            sums=None if of_tokens else given.logps,
            weights=given.constant_weights("ref_token_weights", layout.labels),
        )

    def check_enough(self, policy: ModelInputs, *, kl: bool, pilots: bool) -> None:
        """Raise ValueError or TypeError where the objective needs a reference model that is not there or not alike."""
        if pilots and self.model is None and self.token_logps is None:
            raise ValueError(
                "the objective draws tokens of policy and reference: pass ref_hidden and ref_head, ref_logps of tokens "
                "in labels' shape, or "
                'pair_inputs["chosen_pilot"] and ["rejected_pilot"], see spo_kernels.extras.token_weights.pilots'
            )
        if kl and self.model is None:
            raise ValueError("the objective needs the KL divergence from the reference: pass ref_hidden and ref_head")
        if kl and self.model is not None:
            policy.check_same_vocabulary(self.model)

    def of_tokens(
        self,
        layout: LabelLayout,
        counted: Tensor,
        tokens: Tokens,
        dtype: torch.dtype,
        workspace_bytes: int | None,
        backend: str | None,
    ) -> Tensor | None:
        """Log-probabilities in labels' shape, 0 where one does not count; None where sums were given, or nothing."""
        if self.token_logps is not None:
            return self.token_logps.detach().to(dtype).masked_fill(~counted, 0.0)
        if self.model is None:
            return None
        execution = Execution.resolve(workspace_bytes, backend, self.model)
        with torch.no_grad():
            logp, _ = LogprobCall.of(self.model, tokens, layout.shift, execution).run()
        return logp


def _are_of_tokens(logps: Tensor | None, layout: LabelLayout) -> bool:
    """Whether the reference's log-probabilities, checked here, are of tokens; else they are sums, or none.

    As many tokens as sequences are taken for sums.
    """
    if logps is None:
        return False
    sums = (layout.sequences,)
    check_vector("ref_logps", logps, layout.labels, sums, layout.labels.shape)
    if logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"ref_logps must be float32 or float64, got {logps.dtype}, in which a sum of log-probabilities is off by "
            "up to 1 nat"
        )
    return logps.shape != sums


def _model(given: Given, policy: Given, labels: Tensor, of_tokens: bool) -> ModelInputs | None:
    """The reference's hidden states and head, or None where they were not given."""
    hidden, head = given.hidden, given.head
    if given.logps is not None and not (hidden is head is None):
        raise ValueError("pass either ref_logps, or ref_hidden with ref_head, not both")
    if given.token_weights is not None and hidden is None and not of_tokens:
        raise ValueError(
            "ref_token_weights needs ref_hidden and ref_head, or ref_logps of tokens in labels' shape: these are summed"
        )
    if hidden is None and head is None:
        return None
    if hidden is None or head is None:
        missing = "ref_head" if head is None else "ref_hidden"
        raise ValueError(f"ref_hidden and ref_head go together; {missing} is missing")
    assert policy.head is not None
    return ModelInputs.resolve_reference(hidden, head, labels, policy.head)
