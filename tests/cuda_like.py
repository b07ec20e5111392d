"""Tensors that say they are on a GPU where there is none, and a list of what would make the host wait for it.

Data are on the CPU; Python sees `cuda:0`, autograd and the kernels underneath a CPU. A tensor on the CPU among others
is an error, as it is on a GPU.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from spo_kernels.engine import checks

DEVICE = torch.device("cuda:0")
# the size of their result depends on values
SIZED_BY_VALUES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::repeat_interleave"}
torch_tensor = torch.tensor
_waits: list[str] = []


def _wait(why: str) -> None:
    """Note it with the file that asked for it."""
    files = (Path(frame.filename) for frame in reversed(traceback.extract_stack()))
    file = next((path.name for path in files if "spo_kernels" in path.parts[-3:-1]), "elsewhere")
    _waits.append(f"{file}: {why}")


class CudaLike(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    @staticmethod
    def __new__(cls, data):
        shape = {"strides": data.stride(), "storage_offset": data.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(
            cls, data.size(), **shape, dtype=data.dtype, device="cpu", requires_grad=data.requires_grad
        )

    def __init__(self, data):
        self.data_on_cpu = data

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    device = property(lambda self: DEVICE)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        _wait("tolist")
        return self.data_on_cpu.tolist()

    def cpu(self):
        _wait("copied to the CPU")
        return self.data_on_cpu.clone()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, CudaLike) and tensor.ndim:
                raise RuntimeError(f"{name}: a tensor on the CPU, {list(tensor.shape)}, among those on a GPU")
        if name == "aten::_local_scalar_dense":
            _wait("item")
        elif name in SIZED_BY_VALUES and kwargs.get("output_size") is None:
            _wait(name.removeprefix("aten::"))
        elif name.startswith("aten::index") and any(
            isinstance(index, CudaLike) and index.dtype == torch.bool for index in tree_leaves(args[1])
        ):
            _wait("index by a mask")
        found = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        if name == "aten::_local_scalar_dense":
            return found
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_outside, found))


def _inside(value):
    return value.data_on_cpu if isinstance(value, CudaLike) else value


def _outside(value):
    return CudaLike(value) if isinstance(value, torch.Tensor) and not isinstance(value, CudaLike) else value


def _factory(function):
    """What is asked for on a GPU is made on the CPU, and says that it is on a GPU."""

    def made(*args, device=None, **kwargs):
        if device is None or torch.device(device).type != "cuda":
            return function(*args, device=device, **kwargs)
        if function is torch_tensor:
            _wait("values of the host")
        return CudaLike(function(*args, device="cpu", **kwargs))

    return made


def pretend_a_gpu(monkeypatch):
    """As if there were a GPU; the list of waits."""
    unreadable = checks._unreadable
    monkeypatch.setattr(checks, "_unreadable", lambda t: None if isinstance(t, CudaLike) else unreadable(t))
    properties = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("arange", "empty", "full", "ones", "scalar_tensor", "tensor", "zeros"):
        monkeypatch.setattr(torch, name, _factory(getattr(torch, name)))
    to = torch.Tensor.to

    def moved(tensor, *args, **kwargs):
        asked = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device | str)]
        if not any(torch.device(device).type == "cuda" for device in asked):
            return to(tensor, *args, **kwargs)
        if not isinstance(tensor, CudaLike) and not kwargs.get("non_blocking"):
            _wait("copied to the GPU")
        return _outside(tensor)

    monkeypatch.setattr(torch.Tensor, "to", moved)
    _waits.clear()
    return _waits
