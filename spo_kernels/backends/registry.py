"""The one place that decides which backend runs: explicit argument, environment, availability.

A new backend is a file with a `Registration`, and its line here.
"""

from functools import cache

import torch

from spo_kernels.backends import cpp_backend, cuda_backend, environment, torch_backend
from spo_kernels.backends.contract import Backend
from spo_kernels.backends.registration import BackendStatus, Registration
from spo_kernels.backends.triton import availability as triton_backend

# Automatic choice takes the first in this order that serves the tensors; where none does, torch's operations do.
REGISTRATIONS: dict[str, Registration] = {
    registration.name: registration
    for registration in (
        torch_backend.REGISTRATION,
        cpp_backend.REGISTRATION,
        triton_backend.REGISTRATION,
        cuda_backend.REGISTRATION,
    )
}
_FALLBACK = torch_backend.REGISTRATION.name


def backend_info() -> dict[str, BackendStatus]:
    """What each backend is, or why it cannot be used here."""
    return {name: registration.status() for name, registration in REGISTRATIONS.items()}


def choose_backend(requested: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend for tensors of this device and dtype.

    Raises:
        ValueError: `requested` (or SPO_BACKEND) is no backend's name.
        RuntimeError: it names a backend that is missing, or that cannot serve these tensors.
    """
    name = requested or environment.backend_name()
    source = "backend" if requested else "SPO_BACKEND"
    if name is None:
        for registration in REGISTRATIONS.values():
            if device.type in registration.automatic_on and registration.why_not(device, dtype) is None:
                return registration.name
        return _FALLBACK
    if name not in REGISTRATIONS:
        raise ValueError(f"{source} = {name!r} is not a backend; expected one of {', '.join(REGISTRATIONS)}")
    reason = REGISTRATIONS[name].why_not(device, dtype)
    if reason is not None:
        raise RuntimeError(f"{source} = {name!r} cannot be used: {reason}")
    return name


# what torch.compiler.assume_constant_result sets; the decorator itself imports torch._dynamo, 0.5 s and more
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def load_backend(name: str) -> Backend:
    """The backend of that name, which `choose_backend` has found usable.

    Raises:
        RuntimeError: It is missing; the message says why.
    """
    return REGISTRATIONS[name].load()


def has_pair_loss(name: str) -> bool:
    """Whether the backend of that name, which `choose_backend` has found usable, has a kernel for the pair loss."""
    return load_backend(name).pair_loss_available


# as above: torch.compile then keeps the answer instead of tracing through the loader
has_pair_loss._dynamo_marked_constant = True  # type: ignore[attr-defined]
