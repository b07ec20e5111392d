"""Every environment variable that the library reads, in one place.

SPO_BACKEND        tile backend used when the call names none: torch, cpp, triton, cuda
SPO_DISABLE_JIT    1: never build the extension on first use
SPO_CUDA_ARCHS     what the CUDA extension is built for, e.g. "80;90+PTX" (default: on first use the present device,
                   else 80;90;100+PTX;120)
SPO_CACHE_DIR      where an extension built on first use is kept (default: ~/.cache/spo_kernels)
SPO_AUTOTUNE       1: time the Triton kernels' configurations on first use instead of taking the table's
TRITON_INTERPRET   Triton's own: 1 lets backend="triton" run on CPU tensors, slowly, for tests
"""

import os
from pathlib import Path


def backend_name() -> str | None:
    """The backend that the environment asks for, or None."""
    return os.environ.get("SPO_BACKEND") or None


def cpu_product() -> str:
    """Whose matrix products the cpp backend uses: auto, native or vendor."""
    value = os.environ.get("SPO_CPU_PRODUCT") or "auto"
    if value not in ("auto", "native", "vendor"):
        raise ValueError(f"SPO_CPU_PRODUCT = {value!r}; expected auto, native or vendor")
    return value


def jit_disabled() -> bool:
    """Whether building the extension on first use is switched off."""
    return os.environ.get("SPO_DISABLE_JIT", "0") not in ("", "0")


def cuda_architectures() -> str | None:
    """What the CUDA extension is to be built for, or None."""
    return os.environ.get("SPO_CUDA_ARCHS") or None


def cache_dir() -> Path:
    """The folder that keeps extensions built on first use."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spo_kernels"
    return Path(os.environ.get("SPO_CACHE_DIR") or default)


def autotune() -> bool:
    """Whether Triton kernels choose their configuration by timing."""
    return os.environ.get("SPO_AUTOTUNE", "0") not in ("", "0")


def triton_interpreted() -> bool:
    """Whether Triton interprets its kernels, by the same spellings that Triton accepts."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
