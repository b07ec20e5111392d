"""Every environment variable that the library reads, in one place.

Ours, read when they are needed, not when the package is imported (SPO_AUTOTUNE: when the kernels are):

SPO_BACKEND          backend used when the call names none: torch, cpp, triton, cuda
SPO_CPU_PRODUCT      whose matrix products the cpp backend uses: auto (default), native (the extension's own) or vendor
                     (torch's)
SPO_CPU_ISA          the widest instructions that the cpp backend uses: portable, avx2, avx512 (default: all there are)
SPO_AUTOTUNE         1: time the Triton kernels' configurations on first use instead of taking the table's
SPO_DISABLE_JIT      1: never build an extension on first use
SPO_CUDA_ARCHS       what the CUDA extension is built for, e.g. "80;90+PTX" (default: on first use the present device,
                     else 80;90;100+PTX;120)
SPO_SKIP_CUDA_BUILD  1: `pip install` builds no CUDA extension
SPO_CACHE_DIR        where an extension built on first use is kept (default: spo_kernels in XDG_CACHE_HOME)

Of others, with their meaning there:

TRITON_INTERPRET     1 lets backend="triton" run on CPU tensors, slowly, for tests
XDG_CACHE_HOME       the user's folder for caches (default: ~/.cache)
CXX                  the C++ compiler, before c++, g++ and clang++ on PATH
CUDA_HOME            where nvcc is looked for first, in its folder bin
PATH                 where compilers and ninja are looked for

Only the standard library is imported here: `setup.py` reads these variables too, where there is no torch.
"""

import os
from pathlib import Path


def _flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def backend_name() -> str | None:
    """The backend that the environment asks for, or None."""
    return os.environ.get("SPO_BACKEND") or None


def cpu_product() -> str:
    """Whose matrix products the cpp backend uses: auto, native or vendor."""
    value = os.environ.get("SPO_CPU_PRODUCT") or "auto"
    if value not in ("auto", "native", "vendor"):
        raise ValueError(f"SPO_CPU_PRODUCT = {value!r}; expected auto, native or vendor")
    return value


def cpu_instruction_set() -> str | None:
    """The instruction set that the cpp backend is to use, or None for the machine's widest."""
    value = os.environ.get("SPO_CPU_ISA") or None
    if value not in (None, "portable", "avx2", "avx512"):
        raise ValueError(f"SPO_CPU_ISA = {value!r}; expected portable, avx2 or avx512")
    return value


def autotune() -> bool:
    """Whether Triton kernels choose their configuration by timing."""
    return _flag("SPO_AUTOTUNE")


def jit_disabled() -> bool:
    """Whether building an extension on first use is switched off."""
    return _flag("SPO_DISABLE_JIT")


def cuda_architectures() -> str | None:
    """What the CUDA extension is to be built for, or None."""
    return os.environ.get("SPO_CUDA_ARCHS") or None


def cuda_build_skipped() -> bool:
    """Whether an installation is to leave the CUDA extension out."""
    return _flag("SPO_SKIP_CUDA_BUILD")


def cache_dir() -> Path:
    """The folder that keeps extensions built on first use."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spo_kernels"
    return Path(os.environ.get("SPO_CACHE_DIR") or default)


def triton_interpreted() -> bool:
    """Whether Triton interprets its kernels, by the same spellings that Triton accepts."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def cxx() -> str | None:
    """The C++ compiler that the environment names, maybe with arguments, or None."""
    return os.environ.get("CXX") or None


def cuda_home() -> str | None:
    """The CUDA toolkit that the environment names, or None."""
    return os.environ.get("CUDA_HOME") or None


def search_path() -> str:
    """The folders in which programs are looked for, as PATH has them."""
    return os.environ.get("PATH", "")
