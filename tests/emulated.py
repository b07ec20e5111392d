"""The CUDA kernels on CPU tensors: csrc/cuda compiled for the CPU, its threads as fibres (see tests/cuda_emulator)."""

from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest

from spo_kernels import _backend, _build, _cuda
from spo_kernels.tiles import cuda_tiles

ROOT = Path(__file__).parent.parent
_EMULATOR = ("tests/cuda_emulator/emulator.cpp",)
_HEADERS = tuple(f"tests/cuda_emulator/{name}.h" for name in ("cuda_bf16", "cuda_fp16", "cuda_runtime"))


@cache
def build():
    """The module `_C_cuda`, emulated; a skip where no compiler can make it."""
    try:
        host = _build.cpu_recipe()
        compiler = _build.compiler()
        flags = f"-O1 -std=c++17 -fPIC -fvisibility=hidden -Wno-unknown-pragmas -I {ROOT}/tests/cuda_emulator"
        command = " ".join([compiler, flags, *_build.pybind11_flags(), "-x c++ -c $in -o $out"])
    except _build.BuildError as error:
        pytest.skip(f"the CUDA kernels cannot be compiled for the CPU: {error}")
    recipe = _build.Recipe(
        module="_C_cuda",
        root=ROOT,
        sources=(*_build.CUDA_SOURCES, *_EMULATOR),
        headers=(*_build.CUDA_HEADERS, *_HEADERS),
        compile={".cpp": command, ".cu": command},
        link=f"{compiler} -shared $in -o $out",
        identity=host.identity,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPO_CACHE_DIR", str(ROOT / "build"))
        return _build.load_or_build(recipe)


class EmulatedTiles(cuda_tiles.CudaTiles):
    """On CPU tensors, where there is no device to make current and no stream."""

    device = 0

    def _guard(self, tensor):
        return nullcontext()

    def _queue(self, tensor):
        return self.device, 0


def install(patch):
    """From now on backend="cuda" runs emulated, on CPU tensors."""
    module = build()
    patch.setattr(_cuda, "load", lambda: (module, "emulated"))
    patch.setattr(_cuda, "why_not", lambda device, dtype: None)
    patch.setattr(cuda_tiles, "CudaTiles", EmulatedTiles)
    _backend.load_backend.cache_clear()


@pytest.fixture
def emulated_cuda(monkeypatch):
    """The emulated tiles, for one test the cuda backend's."""
    install(monkeypatch)
    yield EmulatedTiles(build())
    _backend.load_backend.cache_clear()
