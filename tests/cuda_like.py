"""Tensors that say they are on a GPU where there is none, and a record of what a GPU would be asked for.

Data are on the CPU; Python sees `cuda:0`, autograd and the kernels underneath a CPU. A tensor on the CPU among others
is an error, as it is on a GPU.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from spo_kernels.backends.contract import Scalar
from spo_kernels.backends.products import HALF_DTYPES
from spo_kernels.engine import checks, inputs

DEVICE = torch.device("cuda:0")
# the size of their result depends on values
SIZED_BY_VALUES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::repeat_interleave"}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_"}
ALLOCATIONS = ("aten::empty", "aten::new_empty")
# torch 2.11 makes the zeros that a sort's backward scatters into in C++, where these tensors are on a CPU
MADE_BY_TORCH = {"aten::scatter"}
# what the vendor's products and 16-byte accesses of kernels ask of an address, and of what is between two rows
ALIGNMENT = 16
torch_tensor = torch.tensor


@dataclass
class Gpu:
    """What it was asked for, in order."""

    waits: list[str] = field(default_factory=list)
    launches: list[str] = field(default_factory=list)
    products: list[tuple[int, int, int]] = field(default_factory=list)  # rows, depth, columns
    misaligned: set[str] = field(default_factory=set)  # operands of products and kernels, by file
    recording: bool = False

    def wait(self, why: str) -> None:
        """Note it with the file that asked for it; no graph can be recorded across it."""
        if self.recording:
            raise RuntimeError(f"operation not permitted when stream is capturing: {why}")
        self.waits.append(f"{_file()}: {why}")

    def aligned(self, name: str, **matrices: torch.Tensor) -> None:
        """Note those that are not."""
        for operand, matrix in matrices.items():
            apart = [stride for stride, size in zip(matrix.stride(), matrix.shape, strict=True) if size > 1]
            places = [matrix.data_ptr(), *(stride * matrix.itemsize for stride in apart if stride > 1)]
            if any(place % ALIGNMENT for place in places):
                self.misaligned.add(f"{_file()}: {operand} of {name}")

    @contextmanager
    def capture(self) -> Iterator[None]:
        """As if a CUDA graph were recorded."""
        self.recording = True
        try:
            yield
        finally:
            self.recording = False


_gpu = Gpu()


def _file() -> str:
    """Who asks: not a backend, which every product and tile goes through."""
    files = (Path(frame.f_code.co_filename) for frame, _ in traceback.walk_stack(None))
    ours = (path.name for path in files if "spo_kernels" in path.parts[-3:-1] and "backends" not in path.parts)
    return next(ours, "elsewhere")


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

    def data_ptr(self):
        return self.data_on_cpu.data_ptr()

    def get_device(self):
        return DEVICE.index

    def tolist(self):
        _gpu.wait("tolist")
        return self.data_on_cpu.tolist()

    def cpu(self):
        _gpu.wait("copied to the CPU")
        return self.data_on_cpu.clone()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        for tensor in tree_leaves((args, kwargs)):
            strange = isinstance(tensor, torch.Tensor) and not isinstance(tensor, CudaLike) and tensor.ndim
            if strange and name not in MADE_BY_TORCH:
                raise RuntimeError(f"{name}: a tensor on the CPU, {list(tensor.shape)}, among those on a GPU")
        if name == "aten::_local_scalar_dense":
            _gpu.wait("item")
        elif name in SIZED_BY_VALUES and kwargs.get("output_size") is None:
            _gpu.wait(name.removeprefix("aten::"))
        elif name.startswith("aten::index") and any(
            isinstance(index, CudaLike) and index.dtype == torch.bool for index in tree_leaves(args[1])
        ):
            _gpu.wait("index by a mask")
        if not func.is_view and not name.startswith(ALLOCATIONS):
            _gpu.launches.append(name.removeprefix("aten::"))
        if name in PRODUCTS:
            found = _product(func, *tree_map(_inside, args), **tree_map(_inside, kwargs))
        else:
            found = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        if name == "aten::_local_scalar_dense":
            return found
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_outside, found))


def _product(func, *args, out=None, **options):
    """A product by the rules of torch's for GPUs, on a CPU that has none of half precision into float32."""
    matrices = [value for value in args if isinstance(value, torch.Tensor)]
    *onto, a, b = matrices
    result = onto[0] if func._schema.name.endswith("_") else out
    wanted = next((value for value in args if isinstance(value, torch.dtype)), None)
    if a.dtype != b.dtype:
        raise RuntimeError(f"a product of {a.dtype} and {b.dtype}")
    if wanted not in (None, a.dtype) and not (wanted == torch.float32 and a.dtype in HALF_DTYPES):
        raise RuntimeError(f"out_dtype = {wanted} of a product of {a.dtype}")
    given = a.dtype if wanted is None else wanted
    for matrix in (*onto, *([] if out is None else [out])):
        if matrix.dtype != given:
            raise RuntimeError(f"a product of {a.dtype} into {given} beside a matrix of {matrix.dtype}")
    _gpu.products.append((a.shape[0], a.shape[1], b.shape[1]))
    _gpu.aligned("a product", a=a, b=b, **({} if result is None else {"out": result}))
    if wanted is None:
        return func(*args, **options) if out is None else func(*args, **options, out=out)
    found = a.to(given) @ b.to(given)
    found = found + onto[0] if onto else found
    return found if out is None else out.copy_(found)


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
            _gpu.wait("values of the host")
        elif "empty" not in function.__name__:
            _gpu.launches.append(function.__name__)
        return CudaLike(function(*args, device="cpu", **kwargs))

    return made


def pretend_a_gpu(monkeypatch) -> Gpu:
    """As if there were a GPU; what it is asked for."""
    # of another type than a plain tensor on a GPU is
    monkeypatch.setattr(inputs, "why_not_accumulate", lambda weight: None)
    unreadable = checks._unreadable
    monkeypatch.setattr(checks, "_unreadable", lambda t: None if isinstance(t, CudaLike) else unreadable(t))
    properties = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: _gpu.recording)
    for name in ("arange", "empty", "full", "ones", "scalar_tensor", "tensor", "zeros"):
        monkeypatch.setattr(torch, name, _factory(getattr(torch, name)))
    to = torch.Tensor.to

    def moved(tensor, *args, **kwargs):
        asked = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device | str)]
        if not any(torch.device(device).type == "cuda" for device in asked):
            return to(tensor, *args, **kwargs)
        if not isinstance(tensor, CudaLike) and (_gpu.recording or not kwargs.get("non_blocking")):
            _gpu.wait("copied to the GPU")
        return _outside(tensor)

    monkeypatch.setattr(torch.Tensor, "to", moved)
    _gpu.__init__()
    return _gpu


class _Kernel:
    """A Triton kernel that is launched in the interpreter, on what is inside the tensors."""

    def __init__(self, kernel):
        self._kernel = kernel

    def __getitem__(self, grid):
        def launch(**arguments):
            name = self._kernel.__name__.strip("_").removesuffix("_kernel")
            _gpu.launches.append(name)
            matrices = [key for key in ("tile_ptr", "out_ptr", "x_ptr") if arguments.get(key) is not None]
            _gpu.aligned(name, **{key.removesuffix("_ptr"): arguments[key] for key in matrices})
            self._kernel[grid](**{key: _inside(value) for key, value in arguments.items()})

        return launch


def interpret_triton(monkeypatch) -> None:
    """Triton's kernels take these tensors; only where TRITON_INTERPRET was set from the start."""
    from spo_kernels.backends.triton import pair_loss, scale_rows, tile_grad, tile_stats

    for module in (pair_loss, scale_rows, tile_grad, tile_stats):
        resolve = module.resolve

        def wrapped(*arguments, resolve=resolve):
            kernel, options = resolve(*arguments)
            return _Kernel(kernel), options

        monkeypatch.setattr(module, "resolve", wrapped)


class EmulatedKernels:
    """The emulated extension's functions, noted."""

    def __init__(self, native):
        self._native = native
        # as Triton would compile them: by dtypes, what is not given, and which numbers 16 divides
        self.specialised = set()

    def __getattr__(self, name):
        def call(*arguments, **options):
            _gpu.launches.append(name)
            matrices = {key: options[key] for key in ("products", "out") if key in options}
            if name == "scale_rows":
                matrices["x"] = arguments[0]
            for key, (address, stride, scalar) in matrices.items():
                if address % ALIGNMENT or stride * (4 if scalar == Scalar.FLOAT32 else 2) % ALIGNMENT:
                    _gpu.misaligned.add(f"{_file()}: {key} of {name}")
            self.specialised.add((name, *map(_seen, [*matrices.values(), *options.items()])))
            return getattr(self._native, name)(*arguments, **options)

        return call


def _seen(value):
    """What of an argument decides which kernel runs."""
    if isinstance(value, tuple):
        return tuple(map(_seen, value))
    return value % 16 == 0 if type(value) is int and value else value
