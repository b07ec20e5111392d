"""Every environment variable that the library reads, in one place.

SPO_BACKEND        tile backend used when the call names none: torch, cpp
SPO_DISABLE_JIT    1: never build the extension on first use
SPO_CACHE_DIR      where an extension built on first use is kept (default: ~/.cache/spo_kernels)
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


def cache_dir() -> Path:
    """The folder that keeps extensions built on first use."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spo_kernels"
    return Path(os.environ.get("SPO_CACHE_DIR") or default)
