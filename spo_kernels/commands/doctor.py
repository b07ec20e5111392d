"""What this machine has, whether the library is right and fast on it, and what to do about what was found.

Ends with exit code 0 where everything that is there works, else 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from spo_kernels._version import __version__
from spo_kernels.backends import environment
from spo_kernels.backends.registration import BackendStatus
from spo_kernels.backends.registry import backend_info, choose_backend, load_backend
from spo_kernels.commands.self_test import LARGEST_SUM_ERROR, TOKENS, VOCAB, Found, self_test
from spo_kernels.integrations.trl_seam import TESTED

LIBRARIES = ("numpy", "triton", "transformers", "accelerate", "peft", "datasets", "trl")
INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_bf16")
DTYPES = (torch.float32, torch.bfloat16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--no-test", action="store_true", help="leave the self-test out, which takes a few seconds a device"
    )


def run(options: argparse.Namespace) -> int:
    """Print what was found; 0 where everything that is there works."""
    print("Versions")
    print(f"  spo_kernels {__version__}, python {platform.python_version()}, torch {torch.__version__}")
    versions = {name: _version(name) for name in LIBRARIES}
    print("  " + ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items()))
    print("Processor")
    print("\n".join(f"  {line}" for line in _processor()))
    print("Backends")
    try:
        found = backend_info()
    except ValueError as error:
        print(f"  {error}")
        return 1
    for name, status in found.items():
        print(f"  {name:<7}{'yes' if status.available else 'no':<5}{status.detail}")
    problems: list[str] = []
    tested: list[Found] = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        try:
            print(f"  on {device}: {', '.join(_chosen(device, dtype) for dtype in DTYPES)}")
            tested += [] if options.no_test else [self_test(device, dtype) for dtype in DTYPES]
        except Exception as error:
            problems.append(f"{device}: {type(error).__name__}: {error}")
    if tested:
        print(f"Self-test: {TOKENS} tokens, V = {VOCAB}, forward and backward, beside logits in torch")
        print("\n".join(f"  {line}" for line in _table(tested)))
    problems += [
        f"{each.dtype} on {each.device} ({each.backend}) is wrong here: please report it with this text; until then, "
        "SPO_BACKEND=torch"
        for each in tested
        if not each.accurate
    ]
    print("What to do")
    for line in [*problems, *_advice(found, versions, tested)] or ["Nothing."]:
        print(f"  {line}")
    return 1 if problems else 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> Iterator[str]:
    fields: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    yield f"{fields.get('model name') or platform.processor() or platform.machine()}, {_cores()} cores for this process"
    has = set(fields.get("flags", "").split())
    yield f"instruction sets: {', '.join(name for name in INSTRUCTIONS if name in has) or 'not known'}"
    yield f"torch: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chosen(device: str, dtype: torch.dtype) -> str:
    """The backend that runs, and whose matrix products."""
    name = choose_backend(None, torch.device(device), dtype)
    own = load_backend(name).products.own_product(dtype)
    return f"{str(dtype).removeprefix('torch.')} {name} with {own or 'torch'} products"


def _table(tested: list[Found]) -> Iterator[str]:
    yield f"{'':<14}{'backend':<9}{'token, nat':>11}{'sum, nat':>10}{'torch':>9}{'gradients':>11}{'ms':>8}{'torch':>8}"
    for each in tested:
        yield (
            f"{each.device + ' ' + str(each.dtype).removeprefix('torch.'):<14}{each.backend:<9}"
            f"{each.token_error:>11.1e}{each.sum_error:>10.1e}{each.torch_sum_error:>9.1e}{each.gradient_error:>11.1e}"
            f"{each.milliseconds:>8.0f}{each.torch_milliseconds:>8.0f}  {'right' if each.accurate else 'WRONG'}"
        )
    yield f"errors against float64; right: a sum within {LARGEST_SUM_ERROR} nat, gradients within rounding"
    yield "times: linear_logprob takes four products, torch three with all logits kept; a loss takes three here too"


def _hidden_package() -> Path | None:
    """The package that is installed, where it is another than the one that runs, which was found in this folder."""
    running = Path(__file__).resolve().parents[1]
    if running.parent != Path.cwd().resolve():
        return None
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != running.parent]
    found = PathFinder.find_spec("spo_kernels", elsewhere)
    return None if found is None or found.origin is None else Path(found.origin).parent


def _advice(found: dict[str, BackendStatus], versions: dict[str, str | None], tested: list[Found]) -> Iterator[str]:
    """What could be better, and how; nothing here is wrong."""
    if (hidden := _hidden_package()) is not None:
        yield f"the source folder here hides the installed package, {hidden}: run from another folder"
    elif not found["cpp"].available:
        yield "cpp is missing, so the CPU runs plain torch: a C++ compiler and pip install ninja pybind11"
    elif "one thread" in found["cpp"].detail:
        yield "the extension was built without OpenMP and uses one thread: build it with a compiler that has -fopenmp"
    if torch.cuda.is_available() and not (found["triton"].available or found["cuda"].available):
        yield "a GPU is there, but neither triton nor cuda: the reasons stand above; pip install triton may do"
    if not torch.cuda.is_available() and Path("/dev/nvidiactl").exists():
        yield "an NVIDIA driver is there, and torch sees no GPU: install a torch with CUDA"
    if versions["trl"] is not None and versions["trl"] not in TESTED:
        yield f"TRL {versions['trl']} was not tested; {' and '.join(TESTED)} were"
    if torch.get_num_threads() > _cores():
        yield f"{torch.get_num_threads()} threads share {_cores()} cores: set OMP_NUM_THREADS={_cores()}"
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > _cores() + 0.5:
        yield "the machine is busy, so times mean little; OMP_WAIT_POLICY=PASSIVE helps where cores are shared"
    if environment.jit_disabled() and not found["cpp"].available:
        yield "SPO_DISABLE_JIT is set: without it the extension would be built on first use"
    for each in tested:
        if each.backend == "torch" and each.device == "cpu" and found["cpp"].available:
            yield f"{each.dtype} runs in the torch backend although cpp is there: is SPO_BACKEND set?"
