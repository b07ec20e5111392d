"""What a causal language model's head multiplies, through whatever wraps the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spo_kernels.head import inner_model


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Last hidden states `[rows, T, H]` of a transformers causal language model, as its head multiplies them.

    With `LMHead.of(model)` they give the model's own logits: after the final norm, and after whatever else the model
    does before its head. Equivalent for a plain Llama: `model.model(**inputs).last_hidden_state`.

    The call goes through `model` itself, so that the hooks of PEFT, DDP, FSDP and DeepSpeed see it; the head runs on
    the last position only. A compiled model runs uncompiled: compile a module that calls this, or the backbone.

    Args:
        model: The model, or what PEFT, DDP, FSDP, DeepSpeed or torch.compile made of it.
        inputs: Of the model's forward: input_ids, attention_mask, position_ids, ...; no labels.

    Raises:
        TypeError: The model has no head.
        ValueError: `labels` were passed; the adapter adds virtual tokens (prompt or prefix tuning).
        RuntimeError: The head did not run.
    """
    return forward_without_logits(model, **inputs)[0]


def forward_without_logits(
    model: nn.Module, run: Callable[..., Any] | None = None, **inputs: Any
) -> tuple[Tensor, Any]:
    """`hidden_states`, and the model's output, whose logits are those of the last position.

    `run` is called in the model's place, for who replaced the model's own forward.
    """
    if inputs.get("labels") is not None:
        raise ValueError("labels belong to the loss, not to the hidden states: leave them out")
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        # a hook that is added to a compiled module is not always called
        model = model._orig_mod  # type: ignore[assignment]
    inner = inner_model(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None:
        raise TypeError(f"model must be a transformers causal language model with a head, got {type(inner).__name__}")
    seen: list[Tensor] = []

    def last_position(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(arguments[0])
        return arguments[0][..., -1:, :], *arguments[1:]

    hook = head.register_forward_pre_hook(last_position)
    try:
        output = (run or model)(**inputs, use_cache=False)
    finally:
        hook.remove()
    if not seen:
        raise RuntimeError(f"{type(inner).__name__}: its head did not run, so its hidden states were not seen")
    (hidden,) = seen
    given = inputs.get("input_ids")
    if isinstance(given, Tensor) and hidden.shape[:-1] != given.shape:
        raise ValueError(
            f"{type(model).__name__}: input_ids are {list(given.shape)} and hidden states {list(hidden.shape[:-1])}: "
            "an adapter that adds virtual tokens (prompt, prefix or p-tuning) is not supported"
        )
    return hidden, output


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device
