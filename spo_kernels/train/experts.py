"""The auxiliary loss of mixtures of experts: it keeps their routers from sending all tokens to a few experts.

The configuration decides, as in transformers and TRL: where `output_router_logits` is set, `router_aux_loss_coef`
times the model's own `load_balancing_loss_func` is added to the loss.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spo_kernels.head import inner_model
from spo_kernels.train.batches import IGNORE_INDEX
from spo_kernels.train.errors import TrainError


@dataclass(frozen=True)
class RouterLoss:
    """`function(router logits of each layer, experts, experts per token, mask)`, which counts `coefficient` times."""

    coefficient: float
    function: Any
    experts: int
    per_token: int

    def __call__(self, router_logits: Any, labels: Tensor) -> Tensor:
        """Of a batch's [rows, T] tokens up to the last that counts: what is right of it is padding."""
        counts = (labels != IGNORE_INDEX).int()
        mask = counts.flip(1).cummax(1).values.flip(1)
        # At least one, in a batch without responses too.
        mask[:, 0] = 1
        return self.function(tuple(router_logits), self.experts, self.per_token, mask)


def router_loss(model: Any) -> RouterLoss | None:
    """What the configuration of a causal language model, as transformers loads it, asks for."""
    model = inner_model(model)
    text = model.config.get_text_config()
    coefficient = getattr(text, "router_aux_loss_coef", 0.0) or 0.0
    if not getattr(text, "output_router_logits", False) or not coefficient:
        return None
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")
    found = {name: getattr(model, name, None) or getattr(text, name, None) for name in names}
    experts = found["num_experts"] or found["num_local_experts"] or found["n_routed_experts"]
    if function is None or not isinstance(experts, int) or not isinstance(found["num_experts_per_tok"], int):
        raise TrainError(
            f"{type(model).__name__}: output_router_logits and router_aux_loss_coef {coefficient} ask for an auxiliary "
            "loss that is not known for this architecture; set one of them to false or 0 in its config.json"
        )
    return RouterLoss(float(coefficient), function, experts, found["num_experts_per_tok"])
