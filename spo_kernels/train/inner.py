"""The lower level of SPO: the value of the SFT loss after a few gradient steps from the current weights.

Reconstruction, not verified against the paper (arXiv 2507.07723): public notes on it speak of a single-step
gradient update and of the lower level's optimal-value function as a penalty; step size, normalisation and
what is detached were not available. Here, for the chosen responses y_w of a micro-batch,

    θ_0 = θ,   θ_{k+1} = θ_k - η ∇ L_SFT(θ_k),   L_SFT(θ) = mean over pairs of -log πθ(y_w|x),   k < K,

and the value of pair i is v_i = -log π_{θ_K}(y_w|x), a constant for the upper level.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spo_kernels.losses import Objective
from spo_kernels.train.batches import IGNORE_INDEX
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.policy import Policy


@dataclass(frozen=True)
class InnerSteps:
    """K plain SGD steps with rate η on the chosen responses; afterwards weights, gradients and random state are
    what they were, bit for bit.

    A step costs a forward and a backward of the chosen half of the micro-batch, the value one more forward; in
    memory, a copy of the trained weights and one of their gradient. Dropout is off: the value is a function of the
    weights.

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
        trained = [p for p in policy.parameters() if p.requires_grad]
        with _undisturbed(policy, trained, accelerator.device):
            for _ in range(self.steps):
                # autograd.grad, not backward: .grad and DDP's hooks are for the upper level
                gradients = torch.autograd.grad(
                    self._nll(policy, batch, accelerator).mean(), trained, allow_unused=True
                )
                self._step(trained, gradients, accelerator if shared else None)
            with torch.no_grad():
                return self._nll(policy, batch, accelerator)

    def _nll(self, policy: Policy, batch: dict[str, Any], accelerator: Any) -> Tensor:
        labels = batch["labels"]
        # a new autocast context each time: within one, half-precision copies of weights are reused
        with accelerator.autocast():
            nll = -policy.chosen_logps(batch["input_ids"], labels)
        if self.normalization == "sum":
            return nll
        return nll / (labels[: len(nll)] != IGNORE_INDEX).sum(-1).clamp_min(1)

    @torch.no_grad()
    def _step(self, trained: list[nn.Parameter], gradients: tuple[Tensor | None, ...], accelerator: Any) -> None:
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                if accelerator is not None and accelerator.num_processes > 1:
                    gradient = accelerator.reduce(gradient, "mean")
                parameter.add_(gradient, alpha=-self.learning_rate)


def build_inner(config: TrainConfig, objective: Objective | None) -> InnerSteps | None:
    """What the options ask for; `build_objective` has checked that they go together."""
    if not config.spo_inner_steps or config.spo_inner_lr is None:
        return None
    return InnerSteps(config.spo_inner_steps, config.spo_inner_lr, getattr(objective, "normalization", "mean"))


@contextmanager
def _undisturbed(policy: nn.Module, trained: list[nn.Parameter], device: torch.device) -> Iterator[None]:
    """Evaluation mode with gradients; weights, modes and random state are restored, also after an exception."""
    modes = [(module, module.training) for module in policy.modules()]
    copies = [p.detach().clone() for p in trained]
    policy.eval()
    for module, training in modes:
        # checkpointing layers ask for the training mode; set on them alone, their dropout stays off
        if getattr(module, "gradient_checkpointing", False):
            module.training = training
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for parameter, copy in zip(trained, copies, strict=True):
                parameter.copy_(copy)
        for module, training in modes:
            module.training = training
