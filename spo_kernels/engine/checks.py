"""Checks of what the caller passed: every message names the argument, what was expected and what came."""

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from spo_kernels.arguments import check_flag, is_whole

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def can_look(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device, and outside a trace that knows none."""
    return tensor.device.type == "cpu" and not is_traced(tensor)


def is_traced(tensor: Tensor) -> bool:
    """Whether there are no values: under torch.compile, or in a FakeTensor."""
    return torch.compiler.is_compiling() or type(tensor) is FakeTensor


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded: shapes then cannot depend on values."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def refuse_double_backward(name: str) -> None:
    """Called in a backward: raise RuntimeError where its gradient is to be differentiated; `name` is the function's."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} does not support double backward: its gradient cannot be differentiated (create_graph=True was "
            "passed)"
        )


def check_tensor(name: str, value: object, labels: Tensor | None = None) -> None:
    """`value` must be a tensor whose memory can be read: dense, and no wrapper around other tensors.

    It is a FakeTensor if and only if `labels` is one.

    Raises:
        TypeError: It is something else; the message says what to do.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if torch.compiler.is_compiling():
        return
    came = _unreadable(value)
    if came is not None:
        raise TypeError(f"{name} must be a dense torch.Tensor with memory of its own, got {came}")
    if labels is None or value.device != labels.device:  # where devices differ, that is what is wrong
        return
    if (type(value) is FakeTensor) != (type(labels) is FakeTensor):
        fake, real = (name, "labels") if type(value) is FakeTensor else ("labels", name)
        raise TypeError(f"{fake} is a FakeTensor, but {real} is not: convert all tensors, or none")


def _unreadable(value: Tensor) -> str | None:
    """Why a kernel cannot read the tensor's memory and what to do, or None where it can."""
    kind = type(value)
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return "one inside a torch.func transform (grad, vmap, ...), which is not supported: use torch.autograd"
    if value.is_nested:
        return "a nested tensor: pass its values() as a packed batch, with its offsets() as cu_seqlens"
    if value.layout != torch.strided:
        return f"a {str(value.layout).removeprefix('torch.')} tensor: pass to_dense()"
    if kind is FakeTensor or kind is Tensor or kind is torch.nn.Parameter:
        if value.device.type == "meta" and kind is not FakeTensor:
            return "a meta tensor, which has no data: load it (to_empty), or use FakeTensorMode for shapes"
        if value.is_neg():  # its memory holds the values of the other sign
            return "a lazily negated tensor: pass resolve_neg()"
        return "a quantised tensor: pass dequantize()" if value.is_quantized else None
    if hasattr(value, "full_tensor"):
        return f"a {kind.__name__}, of which this process holds a part: pass full_tensor()"
    if is_traceable_wrapper_subclass(value) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {kind.__name__}, which wraps other tensors: pass a plain tensor with its values"
    return None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where autocast is on, it is not inside."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def check_vector(name: str, value: Tensor, labels: Tensor, *shapes: tuple[int, ...]) -> None:
    """`value` must be floating, of one of the shapes, on labels' device."""
    check_tensor(name, value, labels)
    # not `value.shape not in shapes`: torch.compile takes sizes that are other expressions of the same for different
    if not any([value.shape == torch.Size(shape) for shape in shapes]):
        known = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} must have shape {known}, got {list(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.device != labels.device:
        raise ValueError(f"{name} is on {value.device}, but labels is on {labels.device}")


def check_token_weights(name: str, weights: Tensor, labels: Tensor) -> None:
    """`weights` must be one finite floating number per label."""
    check_tensor(name, weights, labels)
    if weights.shape != labels.shape:
        raise ValueError(f"{name} must have labels' shape {list(labels.shape)}, got {list(weights.shape)}")
    if not weights.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {weights.dtype}")
    if weights.device != labels.device:
        raise ValueError(f"{name} is on {weights.device}, but labels is on {labels.device}")
    finite = weights.detach().isfinite()
    if not can_look(weights):
        torch._assert_async(finite.all(), f"{name} must be finite")
    elif not bool(finite.all()):
        place, value = _first(name, weights, ~finite)
        raise ValueError(f"{name} must be finite, got {place} = {value}")


def check_labels(labels: Tensor, shift: bool) -> None:
    """`labels` must be int64, with a dimension to shift along where they are shifted."""
    check_flag("shift", shift)
    check_tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if shift and labels.ndim == 0:
        raise ValueError("labels must have a last dimension to shift along, got a 0-d tensor")


def check_label_range(labels: Tensor, vocab: int, ignore_index: int | None) -> None:
    """Every label is `ignore_index` or lies in [0, vocab); None where no label is to be ignored."""
    if labels.numel() == 0:
        return
    counting = labels if ignore_index is None else labels.masked_fill(labels == ignore_index, 0)
    lowest, highest = counting.aminmax()
    if labels.is_cuda:
        torch._assert_async((lowest >= 0) & (highest < vocab), f"a label is outside [0, {vocab})")
    elif lowest.item() < 0 or highest.item() >= vocab:
        place, value = _first("labels", labels, (counting < 0) | (counting >= vocab))
        raise IndexError(f"{place} = {value} is outside [0, {vocab})")


def _first(name: str, values: Tensor, wrong: Tensor) -> tuple[str, float]:
    """Where the first wrong value is, as one would index it, and the value."""
    where = tuple(wrong.nonzero()[0].tolist())
    index = ", ".join(str(i) for i in where)
    return f"{name}[{index}]" if where else name, values[where].item()


def check_cu_seqlens(cu_seqlens: Tensor, labels: Tensor, name: str = "labels") -> None:
    """`cu_seqlens` describes packed labels (or what has this name), `[N]`, completely."""
    tokens, device = labels.shape, labels.device
    check_tensor("cu_seqlens", cu_seqlens, labels)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [S + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != device and not cu_seqlens.is_cpu:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, but {name} is on {device}")
    if len(tokens) != 1:
        raise ValueError(f"{name} must be packed, [N], where cu_seqlens is given; got {list(tokens)}")
    if not can_look(cu_seqlens):
        good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens[0]) & (cu_seqlens.diff() >= 0).all()
        torch._assert_async(good, f"cu_seqlens must start at 0, end at N, the number of {name}, and not decrease")
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens[0]:
        came = f"{bounds[0]} and {bounds[-1]} ({name} have shape {list(tokens)})"
        raise ValueError(f"cu_seqlens must start at 0 and end at N = {tokens[0]}, got {came}")
    for i, (start, stop) in enumerate(pairwise(bounds)):
        if stop < start:
            raise ValueError(f"cu_seqlens must not decrease, got cu_seqlens[{i + 1}] = {stop} after {start}")


def check_int(name: str, value: object) -> None:
    """`value` must be an int."""
    if not is_whole(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {value}")


def check_workspace_bytes(value: int | None) -> None:
    """`workspace_bytes` must be a positive number that fits 64 bits, or None."""
    if value is None:
        return
    if not is_whole(value):
        raise TypeError(f"workspace_bytes must be an int or None, got {value!r}")
    if not 0 < value < 2**63:  # an op takes it as an int64
        raise ValueError(f"workspace_bytes must be positive and below 2**63, got {value}")
