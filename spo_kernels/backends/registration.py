"""What a backend tells the registry about itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from spo_kernels.backends.contract import Backend


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
