"""Whether the Triton kernels can run here, and the backend's registration.

`import spo_kernels` does not import triton; `load` does.
"""

import importlib
from functools import cache
from types import ModuleType

import torch

from spo_kernels.backends import environment
from spo_kernels.backends.registration import NO_FLOAT64, Registration, too_old


@cache
def load() -> tuple[ModuleType | None, str]:
    """The backend's module and what it runs on, or None and why it is missing."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return None, f"triton cannot be imported: {error}"
    version = f"triton {triton.__version__}"
    if environment.triton_interpreted():
        where = "its interpreter, on CPU tensors (TRITON_INTERPRET is set)"
    elif not torch.cuda.is_available():
        return None, f"{version} is there, but torch {torch.__version__} sees no NVIDIA or AMD GPU"
    else:
        where = torch.cuda.get_device_name()
    try:
        module = importlib.import_module("spo_kernels.backends.triton.backend")
    except Exception as error:
        return None, f"{version} cannot define the kernels: {type(error).__name__}: {error}"
    return module, f"{version}, {where}"


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these tensors cannot go through the kernels, or None where they can."""
    if dtype == torch.float64:
        return NO_FLOAT64
    if device.type == "cpu":
        if not environment.triton_interpreted():
            return "it runs on a GPU, and the tensors are on cpu (TRITON_INTERPRET=1 interprets the kernels there)"
    elif device.type != "cuda":
        return f"it runs on NVIDIA and AMD GPUs, and the tensors are on {device}"
    elif torch.version.hip is None and (reason := too_old(device)) is not None:
        return reason
    module, detail = load()
    return detail if module is None else None


REGISTRATION = Registration.of_module("triton", ("cuda",), load, why_not, lambda module: module.TritonBackend())
