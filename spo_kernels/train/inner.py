"""SPO's lower level in a run: `bilevel_value` of each micro-batch, as the options ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from spo_kernels.extras.bilevel import bilevel_value
from spo_kernels.losses import Objective
from spo_kernels.losses.reconstructed.spo import value_normalization
from spo_kernels.train.batches import IGNORE_INDEX
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.policy import Policy


@dataclass(frozen=True)
class InnerSteps:
    """K inner steps with rate η on the chosen responses of a micro-batch; see `bilevel_value`.

    Attributes:
        steps: K >= 1.
        learning_rate: η > 0.
        normalization: -log πθ(y_w|x) as its "mean" over response tokens or as their "sum"; SPO's own.
    """

    steps: int
    learning_rate: float
    normalization: str

    def values(self, policy: Policy, batch: dict[str, Any], accelerator: Any, shared: bool) -> Tensor:
        """Values `[B]` of a batch of `Policy.forward`, as `spo_value` takes them.

        Gradients are means over the pairs of this process's micro-batch; with `shared`, over those of all processes'
        micro-batches, which then must come here equally often: all take the same steps.
        """
        together = shared and accelerator.num_processes > 1
        return bilevel_value(
            policy,
            partial(self._nll, policy, accelerator),
            batch,
            learning_rate=self.learning_rate,
            steps=self.steps,
            reduce_gradient=partial(accelerator.reduce, reduction="mean") if together else None,
        )

    def _nll(self, policy: Policy, accelerator: Any, batch: dict[str, Any]) -> Tensor:
        labels = batch["labels"]
        # a new autocast context each time: within one, half-precision copies of weights are reused
        with accelerator.autocast():
            nll = -policy.chosen_logps(batch["input_ids"], labels)
        if self.normalization == "sum":
            return nll
        return nll / (labels[: len(nll)] != IGNORE_INDEX).sum(-1).clamp_min(1)


def build_inner(config: TrainConfig, objective: Objective | None) -> InnerSteps | None:
    """What the options ask for; `build_objective` has checked that they go together."""
    if not config.spo_inner_steps or config.spo_inner_lr is None:
        return None
    assert objective is not None
    return InnerSteps(config.spo_inner_steps, config.spo_inner_lr, value_normalization(objective))
