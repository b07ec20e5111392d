"""Checks of what the caller passed: every message names the argument, what was expected and what came."""

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object) -> None:
    """`value` must be a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_head_inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    """Types, shapes, dtypes and devices of the primitive's tensors."""
    named = {"hidden": hidden, "weight": weight, "labels": labels}
    if bias is not None:
        named["bias"] = bias
    for name, value in named.items():
        check_tensor(name, value)
    if hidden.ndim < 1:
        raise ValueError("hidden must have shape [..., H], got a 0-d tensor")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape [V, H] with H = {hidden.shape[-1]} (hidden's last dimension), "
            f"got {list(weight.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight must not be empty, got shape {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must have hidden's leading shape {list(hidden.shape[:-1])}, got {list(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    for name, value in named.items():
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}, but hidden is on {hidden.device}")


def check_float_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """One floating dtype for hidden, weight and bias."""
    if hidden.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"hidden must be one of {names}, got {hidden.dtype}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(f"{name} is {value.dtype}, but hidden is {hidden.dtype}; cast one of them")


def check_options(
    logit_scale: float, logit_softcap: float | None, ignore_index: int, workspace_bytes: int | None
) -> None:
    """The scalar options of the primitive."""
    if not isinstance(logit_scale, (int, float)) or not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be a finite number, got {logit_scale!r}")
    if logit_softcap is not None and not (
        isinstance(logit_softcap, (int, float)) and math.isfinite(logit_softcap) and logit_softcap > 0
    ):
        raise ValueError(f"logit_softcap must be a positive number or None, got {logit_softcap!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if workspace_bytes is not None:
        if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
            raise TypeError(f"workspace_bytes must be an int or None, got {workspace_bytes!r}")
        if workspace_bytes <= 0:
            raise ValueError(f"workspace_bytes must be positive, got {workspace_bytes}")


def check_label_range(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Every label is `ignore_index` or lies in [0, vocab)."""
    bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if labels.is_cuda:
        torch._assert_async(~bad.any(), f"a label is outside [0, {vocab})")
        return
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        index = ", ".join(str(i) for i in where)
        place = f"labels[{index}]" if where else "labels"
        raise IndexError(f"{place} = {int(labels[where])} is outside [0, {vocab})")
