"""SPO's lower level for any training loop: the value of the SFT loss after a few gradient steps, and nothing changed.

Reconstruction, not verified against the paper (arXiv 2507.07723): public notes on it speak of a single-step gradient
update and of the lower level's optimal-value function as a penalty; step size, normalisation and what is detached were
not available. Here, for the chosen responses y_w of a batch,

    θ_0 = θ,   θ_{k+1} = θ_k - η ∇ L_SFT(θ_k),   L_SFT(θ) = mean over pairs of -log πθ(y_w|x),   k < K,

and the value of pair i is v_i = -log π_{θ_K}(y_w|x), a constant for the upper level.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from spo_kernels.arguments import check_positive, check_whole

Batch = TypeVar("Batch")


def bilevel_value(
    model: nn.Module,
    nll: Callable[[Batch], Tensor],
    batch: Batch,
    *,
    learning_rate: float,
    steps: int = 1,
    reduce_gradient: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """v of each pair, for `SPO(penalty="hinge", value="input")`: `nll(batch)` after `steps` SGD steps on its mean.

    ::

        def nll(batch):                        # -log πθ(y_w|x) of each pair, normalised as the SPO objective does it
            logps = sequence_logps(model_body(batch["chosen"]), head, batch["chosen_labels"])
            return -logps / batch["chosen_lengths"]

        value = bilevel_value(model, nll, batch, learning_rate=1e-3)
        loss, metrics = fused_spo_loss(..., loss=SPO(penalty="hinge", value="input"), pair_inputs={"spo_value": value})

    Afterwards weights, `.grad`, the modes of modules and the random state are what they were, bit for bit, also after
    an exception. Dropout is off meanwhile: the value is a function of the weights. A step costs a forward and a
    backward of what `nll` computes, the value one more forward; in memory, a copy of the trained weights and one of
    their gradient.

    Args:
        model: The module whose parameters with `requires_grad` take the steps; not its DDP wrapper, whose hooks are
            for the upper level.
        nll: From `batch` to `[B]`, a differentiable function of the model's parameters. It opens its own autocast
            context, if any: within one, half-precision copies of weights outlive a step.
        batch: Whatever `nll` takes.
        learning_rate: η > 0.
        steps: K >= 1.
        reduce_gradient: Mean of a gradient over processes that step together; none where each steps for itself.

    Returns:
        `[B]`, no gradient.

    Raises:
        ValueError: An argument is out of range, or `nll` gives no `[B]`; the message names it.
    """
    check_positive("learning_rate", learning_rate)
    check_whole("steps", steps, 1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model must have a parameter with requires_grad, got none")
    with _undisturbed(model, trained):
        for _ in range(steps):
            # autograd.grad, not backward: .grad and DDP's hooks are for the upper level
            gradients = torch.autograd.grad(_checked(nll(batch)).mean(), trained, allow_unused=True)
            _descend(trained, gradients, learning_rate, reduce_gradient)
        with torch.no_grad():
            return _checked(nll(batch)).detach()


def _checked(values: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or values.ndim != 1:
        came = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"nll must give one value per pair, [B]; got {came}")
    return values


@torch.no_grad()
def _descend(
    trained: list[nn.Parameter],
    gradients: tuple[Tensor | None, ...],
    learning_rate: float,
    reduce_gradient: Callable[[Tensor], Tensor] | None,
) -> None:
    for parameter, gradient in zip(trained, gradients, strict=True):
        if gradient is not None:
            if reduce_gradient is not None:
                gradient = reduce_gradient(gradient)
            parameter.add_(gradient, alpha=-learning_rate)


@contextmanager
def _undisturbed(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode with gradients; weights, modes and random state are restored, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    copies = [parameter.detach().clone() for parameter in trained]
    devices = {parameter.device for parameter in trained if parameter.is_cuda}
    model.eval()
    for module, training in modes:
        # checkpointing layers ask for the training mode; set on them alone, their dropout stays off
        if getattr(module, "gradient_checkpointing", False):
            module.training = training
    try:
        with torch.random.fork_rng(list(devices)), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for parameter, copy in zip(trained, copies, strict=True):
                parameter.copy_(copy)
        for module, training in modes:
            module.training = training
