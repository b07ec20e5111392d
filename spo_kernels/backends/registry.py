"""The one place that decides which tile backend runs: explicit argument, environment, availability."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor

from spo_kernels.backends import cpp_extension, cpp_tiles, cuda_extension, cuda_tiles, environment, torch_tiles
from spo_kernels.backends.contract import TileBackend
from spo_kernels.backends.products import NativeProducts, Products, VendorProducts, accumulator_dtype
from spo_kernels.backends.triton import availability

BACKENDS = ("torch", "cpp", "triton", "cuda")
# those that have a kernel for the pair loss
PAIR_LOSS_BACKENDS = ("triton", "cuda")
# tried in this order where the call and the environment name none; torch runs everywhere
_AUTOMATIC = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used, and what it is or why it is missing."""

    available: bool
    detail: str


def backend_info() -> dict[str, BackendStatus]:
    """What each tile backend is, or why it cannot be used here."""
    native, detail = cpp_extension.load()
    kernels, triton_detail = availability.load()
    cuda, cuda_detail = cuda_extension.load()
    return {
        "torch": BackendStatus(True, "plain torch operations, any device and dtype"),
        "cpp": BackendStatus(native is not None, detail),
        "triton": BackendStatus(kernels is not None, triton_detail),
        "cuda": BackendStatus(cuda is not None, cuda_detail),
    }


def choose_backend(requested: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend for tensors of this device and dtype.

    Raises:
        ValueError: `requested` (or SPO_BACKEND) is no backend's name.
        RuntimeError: it names a backend that is missing, or that cannot serve these tensors.
    """
    name = requested or environment.backend_name()
    source = "backend" if requested else "SPO_BACKEND"
    if name is None:
        candidates = _AUTOMATIC.get(device.type, ())
        return next((c for c in candidates if _why_not(c, device, dtype) is None), "torch")
    if name not in BACKENDS:
        raise ValueError(f"{source} = {name!r} is not a backend; expected one of {', '.join(BACKENDS)}")
    reason = _why_not(name, device, dtype)
    if reason is not None:
        raise RuntimeError(f"{source} = {name!r} cannot be used: {reason}")
    return name


# what torch.compiler.assume_constant_result sets; the decorator itself imports torch._dynamo, 0.5 s and more
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if name == "torch":
        return None
    if name == "triton":
        return availability.why_not(device, dtype)
    if name == "cuda":
        return cuda_extension.why_not(device, dtype)
    if device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {device}"
    if dtype == torch.float64:
        return "it has no float64 tiles; use backend='torch'"
    native, detail = cpp_extension.load()
    return detail if native is None else None


@dataclass(frozen=True)
class Backend:
    """Who multiplies, and who handles the tiles between the products."""

    products: Products
    tiles: TileBackend

    def cell_bytes(self, inputs: Tensor) -> int:
        """Workspace of one cell of a tile: itself, what a pass needs beside it, and its rounded copy for a product."""
        wide = accumulator_dtype(inputs.dtype)
        rounded = self.products.tile_dtype(inputs)
        return math.ceil(wide.itemsize * (1.0 + self.tiles.TEMPORARIES)) + (rounded.itemsize if rounded != wide else 0)


@cache
def load_backend(name: str) -> Backend:
    """The backend of that name, which `choose_backend` has found usable."""
    if name == "torch":
        return Backend(VendorProducts(), torch_tiles)
    if name == "triton":
        kernels, detail = availability.load()
        if kernels is None:
            raise RuntimeError(detail)
        return Backend(VendorProducts(), cast(TileBackend, kernels))
    if name == "cuda":
        module, detail = cuda_extension.load()
        if module is None:
            raise RuntimeError(detail)
        return Backend(VendorProducts(), cuda_tiles.CudaTiles(module))
    native, detail = cpp_extension.load()
    if native is None:
        raise RuntimeError(detail)
    return Backend(NativeProducts(native), cpp_tiles.CppTiles(native))


def load_pair_loss(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The pair loss of one of PAIR_LOSS_BACKENDS, which `choose_backend` has found usable."""
    if name == "triton":
        from spo_kernels.backends.triton.pair_loss import pair_loss

        return pair_loss
    return cast(cuda_tiles.CudaTiles, load_backend(name).tiles).pair_loss
