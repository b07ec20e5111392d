"""Whether the CUDA kernels can run here, and the extension that holds them: prebuilt, else built on first use."""

import importlib
from functools import cache
from types import ModuleType

import torch

from spo_kernels.backends import build, environment
from spo_kernels.backends.registration import NO_FLOAT64, too_old


@cache
def load() -> tuple[ModuleType | None, str]:
    """The extension module and what it is, or None and why it is missing. Builds only where there is a GPU."""
    no_gpu = _no_gpu()
    try:
        module, origin = importlib.import_module("spo_kernels._C_cuda"), "prebuilt"
    except ImportError as prebuilt_error:
        missing = f"no usable prebuilt extension ({prebuilt_error})"
        if no_gpu is not None:
            compiler = build.nvcc()
            rest = f"{compiler} would build it on first use with one" if compiler else build.NO_NVCC
            return None, f"{no_gpu}; {missing}: {rest}"
        if environment.jit_disabled():
            return None, f"{missing}, and SPO_DISABLE_JIT is set"
        try:
            module, origin = build.load_or_build(build.cuda_recipe(_architectures())), "built on first use"
        except build.BuildError as error:
            return None, f"{missing}, and none could be built: {error}"
    if no_gpu is not None:
        return None, f"{no_gpu}; the extension itself is there ({origin})"
    return module, f"{origin}, {torch.cuda.get_device_name()}"


def _no_gpu() -> str | None:
    if torch.version.hip is not None:
        return f"it runs on NVIDIA GPUs, and torch {torch.__version__} is for AMD's"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no NVIDIA GPU"
    return None


def _architectures() -> str:
    """What SPO_CUDA_ARCHS says, else that of the current device alone: the others would only cost time."""
    return environment.cuda_architectures() or build.architecture_of(torch.cuda.get_device_capability())


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these tensors cannot go through the kernels, or None where they can."""
    if dtype == torch.float64:
        return NO_FLOAT64
    if device.type != "cuda":
        reason = f"it runs on an NVIDIA GPU, and the tensors are on {device}"
        # nothing is built for the sake of a message
        return f"{reason}; {load()[1]}" if _no_gpu() is not None else reason
    module, detail = load()
    if module is None:
        return detail
    if (old := too_old(device)) is not None:
        return old
    return _refusal(module, torch.cuda.current_device() if device.index is None else device.index)


@cache
def _refusal(module: ModuleType, index: int) -> str | None:
    """What the driver says against the module's kernels on a device, or None."""
    with torch.cuda.device(index):
        reason = module.why_not(index)
    name = torch.cuda.get_device_name(index)
    return f"the extension cannot run on {name}: {reason}; SPO_CUDA_ARCHS builds it for others" if reason else None
