"""What a backend tells the registry about itself."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from spo_kernels.backends.contract import Backend

# why_not of kernels whose tiles are float32
NO_FLOAT64 = "it has no float64 tiles; use backend='torch'"
# the compute capability that the GPU kernels need at least
_OLDEST = (8, 0)


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used, and what it is or why it is missing."""

    available: bool
    detail: str


@dataclass(frozen=True)
class Registration:
    """One backend, by name: made in the backend's own file, listed in `registry.py`. It loads nothing by itself."""

    name: str
    # types of devices ("cpu", "cuda") where it is tried if neither the call nor the environment names a backend
    automatic_on: tuple[str, ...]
    # whether it can be used on this machine at all
    status: Callable[[], BackendStatus]
    # why tensors of a device and dtype cannot go through it, or None where they can
    why_not: Callable[[torch.device, torch.dtype], str | None]
    # the backend; RuntimeError, with the reason, where it cannot be used
    load: Callable[[], Backend]

    @classmethod
    def of_module(
        cls,
        name: str,
        automatic_on: tuple[str, ...],
        load_module: Callable[[], tuple[ModuleType | None, str]],
        why_not: Callable[[torch.device, torch.dtype], str | None],
        make: Callable[[ModuleType], Backend],
    ) -> "Registration":
        """Of a backend that `make` makes of a module; without it, `load_module` says why it is missing."""

        def status() -> BackendStatus:
            module, detail = load_module()
            return BackendStatus(module is not None, detail)

        def load() -> Backend:
            module, detail = load_module()
            if module is None:
                raise RuntimeError(detail)
            return make(module)

        return cls(name, automatic_on, status, why_not, load)


def too_old(device: torch.device) -> str | None:
    """Why the kernels cannot run on this NVIDIA GPU, or None where they can."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= _OLDEST:
        return None
    return f"it needs compute capability 8.0, and {device} has {capability[0]}.{capability[1]}"
