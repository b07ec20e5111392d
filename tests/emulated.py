"""The CUDA kernels on CPU tensors: csrc/cuda compiled for the CPU, its threads as fibres (see tests/cuda_emulator).

Also on a GPU: the same tests there, with tensors that are moved for each call.
"""

import dataclasses
import subprocess
import tempfile
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch

from spo_kernels.backends import build, cuda_backend, registry
from spo_kernels.backends.registration import BackendStatus

ROOT = Path(__file__).parent.parent
_EMULATOR = ("tests/cuda_emulator/emulator.cpp",)
_HEADERS = tuple(f"tests/cuda_emulator/{name}.h" for name in ("cuda_bf16", "cuda_fp16", "cuda_runtime"))


@cache
def emulated_module():
    """The module `_C_cuda`, emulated; a skip where no compiler can make it."""
    try:
        host = build.cpu_recipe()
        compiler = build.compiler()
        checks = _sanitizer(compiler)
        flags = f"-O1 -std=c++17 -fPIC -fvisibility=hidden -Wno-unknown-pragmas -I {ROOT}/tests/cuda_emulator {checks}"
        command = " ".join([compiler, flags, *build.pybind11_flags(), "-x c++ -c $in -o $out"])
    except build.BuildError as error:
        pytest.skip(f"the CUDA kernels cannot be compiled for the CPU: {error}")
    recipe = build.Recipe(
        module="_C_cuda",
        root=ROOT,
        sources=(*build.CUDA_SOURCES, *_EMULATOR),
        headers=(*build.CUDA_HEADERS, *_HEADERS),
        compile={".cpp": command, ".cu": command},
        link=f"{compiler} -shared {checks} $in -o $out",
        identity=host.identity,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPO_CACHE_DIR", str(ROOT / "build"))
        return build.load_or_build(recipe)


def _sanitizer(compiler):
    """Flags by which an unaligned vector ends the process, as it does on a GPU; nothing where they do not link."""
    flags = "-fsanitize=alignment,bounds,shift,signed-integer-overflow -fno-sanitize-recover=all"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int probe(int x) { return x + 1; }\n")
        command = f"{compiler} {flags} -shared -fPIC {source} -o {folder}/probe.so".split()
        return flags if subprocess.run(command, capture_output=True).returncode == 0 else ""


class EmulatedBackend(cuda_backend.CudaBackend):
    """On CPU tensors, where there is no device to make current and no stream."""

    device = 0

    def _guard(self, tensor):
        return nullcontext()

    def _queue(self, tensor):
        return self.device, 0


class BackendOnGpu:
    """The backend itself, for tensors that lie on the CPU: each call moves their memory there and back."""

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        def call(*arguments, **options):
            moved = {}
            arguments = [_on_gpu(value, moved) for value in arguments]
            options = {key: _on_gpu(value, moved) for key, value in options.items()}
            result = getattr(self._backend, name)(*arguments, **options)
            for here, there in moved.values():
                here.copy_(there)
            return result

        return call


def _on_gpu(value, moved):
    """A tensor's whole memory copied, so that it lies as it lay: strides, offset, and what it shares with others."""
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{name: _on_gpu(part, moved) for name, part in vars(value).items()})
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.untyped_storage()
    key = storage.data_ptr(), value.dtype
    if key not in moved:
        whole = value.new_empty(0).set_(storage)
        moved[key] = whole, whole.cuda()
    return moved[key][1].as_strided(value.shape, value.stride(), value.storage_offset())


def install(patch):
    """From now on backend="cuda" runs emulated, on CPU tensors."""
    backend = EmulatedBackend(emulated_module())
    registration = dataclasses.replace(
        cuda_backend.REGISTRATION,
        status=lambda: BackendStatus(True, "emulated"),
        why_not=lambda device, dtype: None,
        load=lambda: backend,
    )
    patch.setitem(registry.REGISTRATIONS, "cuda", registration)
    registry.load_backend.cache_clear()


@pytest.fixture
def emulated_cuda(monkeypatch):
    """The emulated backend, for one test the cuda backend."""
    install(monkeypatch)
    yield registry.load_backend("cuda")
    registry.load_backend.cache_clear()
