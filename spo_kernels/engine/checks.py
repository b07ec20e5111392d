"""Checks of what the caller passed: every message names the argument, what was expected and what came."""

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object) -> None:
    """`value` must be a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_vector(name: str, value: Tensor, length: int, device: torch.device) -> None:
    """`value` must be a floating `[length]` on hidden's device."""
    check_tensor(name, value)
    if value.shape != (length,):
        raise ValueError(f"{name} must have shape [{length}], got {list(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, but hidden is on {device}")


def check_token_weights(name: str, weights: Tensor, labels: Tensor) -> None:
    """`weights` must be one finite floating number per label."""
    check_tensor(name, weights)
    if weights.shape != labels.shape:
        raise ValueError(f"{name} must have labels' shape {list(labels.shape)}, got {list(weights.shape)}")
    if not weights.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {weights.dtype}")
    if weights.device != labels.device:
        raise ValueError(f"{name} is on {weights.device}, but labels is on {labels.device}")
    finite = weights.detach().isfinite()
    # reading the result would wait for the device, and is a data-dependent branch to torch.compile
    if weights.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(finite.all(), f"{name} must be finite")
    elif not bool(finite.all()):
        where = tuple((~finite).nonzero()[0].tolist())
        index = ", ".join(str(i) for i in where)
        raise ValueError(f"{name} must be finite, got {name}[{index}] = {weights[where].item()}")


def check_head_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, shift: bool = False, prefix: str = ""
) -> None:
    """Types, shapes, dtypes and devices of the primitive's tensors; `prefix` begins the names of the model's."""
    named = {f"{prefix}hidden": hidden, f"{prefix}weight": weight, "labels": labels}
    if bias is not None:
        named[f"{prefix}bias"] = bias
    for name, value in named.items():
        check_tensor(name, value)
    if hidden.ndim < 1:
        raise ValueError(f"{prefix}hidden must have shape [..., H], got a 0-d tensor")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight must have shape [V, H] with H = {hidden.shape[-1]} ({prefix}hidden's last dimension), "
            f"got {list(weight.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"{prefix}weight must not be empty, got shape {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must have shape [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    if labels.shape != hidden.shape[:-1]:
        leading = list(hidden.shape[:-1])
        wrong, expected, came = ("labels", f"{prefix}hidden's leading shape {leading}", list(labels.shape))
        if prefix:
            wrong, expected, came = f"{prefix}hidden", f"the labels' leading shape {list(labels.shape)}", leading
        raise ValueError(f"{wrong} must have {expected}, got {came}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if shift and labels.ndim == 0:
        raise ValueError("labels must have a last dimension to shift along, got a 0-d tensor")
    for name, value in named.items():
        if value.device != labels.device:
            raise ValueError(f"{name} is on {value.device}, but labels is on {labels.device}")
    check_float_dtypes(hidden, weight, bias, prefix=prefix)


def check_float_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "") -> None:
    """One floating dtype for hidden, weight and bias; under autocast, which casts them, any."""
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.dtype not in FLOAT_DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
            raise TypeError(f"{prefix}{name} must be one of {names}, got {value.dtype}")
        if value.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(f"{prefix}{name} is {value.dtype}, but {prefix}hidden is {hidden.dtype}; cast one of them")


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
