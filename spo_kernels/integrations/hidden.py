"""What a causal language model's head multiplies, through whatever wraps the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spo_kernels.head import inner_model
from spo_kernels.head.gathered import ShardedHead
from spo_kernels.integrations.own_logits import check_own_logits, is_new
from spo_kernels.integrations.wrappers import is_gathered_for_forward, is_one_group

Result = TypeVar("Result")
Run = Callable[..., Any]


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Last hidden states `[rows, T, H]` of a transformers causal language model, as its head multiplies them.

    With `LMHead.of(model)` they give the model's own logits: after the final norm, and after whatever else the model
    does before its head. Equivalent for a plain Llama: `model.model(**inputs).last_hidden_state`.

    The call goes through `model` itself, so that the hooks of PEFT, DDP, FSDP and DeepSpeed see it; the head runs on
    the last position only. A compiled model runs uncompiled: compile a module that calls this, or the backbone.

    Args:
        model: The model, or what PEFT, DDP, FSDP, DeepSpeed or torch.compile made of it.
        inputs: Of the model's forward, by name: input_ids, attention_mask, position_ids, ...; no labels.

    Returns:
        `[rows, T, H]`, differentiable, in the dtype in which the head takes them.

    Raises:
        TypeError: The model has no head.
        ValueError: `labels` were passed; the adapter adds virtual tokens (prompt or prefix tuning); the model's logits
            of the first call are not those of its head and configuration.
        RuntimeError: The head did not run; or gradients are wanted of a model that FSDP2 holds as one group, whose
            hooks see no more than its output.
    """
    if torch.is_grad_enabled() and is_one_group(model):
        raise RuntimeError(
            f"{type(model).__name__}: fully_shard made it one group, whose gradients are reduced once that of its "
            "output is known; hidden states go around the output, so theirs would stay as each rank has them: use "
            "FusedPreferenceModel, or shard a module whose forward has the loss, or the decoder layers too"
        )
    return forward_without_logits(model, **inputs)[0]


def forward_without_logits(model: nn.Module, run: Run | None = None, **inputs: Any) -> tuple[Tensor, Any]:
    """`hidden_states`, and the model's output, whose logits are those of the last position, or none: `shard_head`."""
    return forward_to_head(model, lambda hidden: hidden, run, **inputs)


def forward_to_head(
    model: nn.Module, at_head: Callable[[Tensor], Result], run: Run | None = None, **inputs: Any
) -> tuple[Result, Any]:
    """What `at_head` makes of `hidden_states` where the head runs, and the model's output as above.

    There the head's weight is whole, whatever group of FSDP or ZeRO it is in: for a head in a group of its own, the
    result takes the place of the head's output, so that the group's hooks gather the weight again for the backward and
    reduce its gradient after.

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
    logits: list[Tensor] = []
    found: list[Result] = []
    own: Tensor | None = None

    # one of which every process has some rows would have to be gathered for a position
    positions = slice(0, 0) if isinstance(head, ShardedHead) else slice(-1, None)

    def last_position(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(_checked(model, arguments[0], inputs.get("input_ids")))
        return arguments[0][..., positions, :], *arguments[1:]

    in_group = is_gathered_for_forward(head)

    def compute(_: nn.Module, __: Any, output: Tensor) -> Result:
        if in_group and hasattr(output, "full_tensor"):
            raise RuntimeError(
                f"{type(inner).__name__}: the head is split by parallelize_module and in a group of FSDP of its own; "
                "leave it to the group of the model (or of the module whose forward has the loss)"
            )
        nonlocal own
        logits.append(output)
        # a copy, since the model may change them in place
        own = output.detach().clone() if is_new(inner) else None
        return at_head(seen[0])

    def put_back(_: nn.Module, __: Any, result: Result) -> Tensor:
        found.append(result)
        return logits[0]

    hooks = [
        head.register_forward_pre_hook(last_position),
        head.register_forward_hook(compute, prepend=in_group),
        head.register_forward_hook(put_back),
    ]
    try:
        output = (run or model)(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise RuntimeError(f"{type(inner).__name__}: its head did not run, so its hidden states were not seen")
    (result,) = found
    if own is not None:
        check_own_logits(inner, head, own, output)
    return result, output


def _checked(model: nn.Module, hidden: Any, input_ids: Tensor | None) -> Tensor:
    # between layers that tensor parallelism splits; every process is to have all of them
    hidden = hidden.full_tensor() if hasattr(hidden, "full_tensor") else hidden
    if input_ids is not None and hidden.shape[:-1] != input_ids.shape:
        raise ValueError(
            f"{type(model).__name__}: input_ids are {list(input_ids.shape)} and hidden states "
            f"{list(hidden.shape[:-1])}: an adapter that adds virtual tokens (prompt, prefix or p-tuning) is not "
            "supported"
        )
    whole: Tensor = hidden
    return whole


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device
