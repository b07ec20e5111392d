"""Where the GPU tests run, and what they share.

With SPO_GPU_DRY_RUN=1 and TRITON_INTERPRET=1 what needs no CUDA runs on the CPU, the CUDA kernels emulated: a check of
the tests themselves.
"""

import importlib
import os

import emulated
import pytest
import torch

from spo_kernels import backend_info
from spo_kernels.testing import Batch, evaluate

DRY = os.environ.get("SPO_GPU_DRY_RUN") == "1"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cpu" if DRY else "cuda")

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not (CUDA or DRY), reason="torch sees no NVIDIA or AMD GPU")]
needs_cuda = pytest.mark.skipif(not CUDA, reason="torch sees no NVIDIA or AMD GPU")
if DRY and not CUDA:
    emulated.install(pytest.MonkeyPatch())


def backends(*names):
    """A parametrization; those that are missing are skipped with their reasons."""
    info = backend_info()
    marks = {name: pytest.mark.skipif(not info[name].available, reason=info[name].detail) for name in names}
    return pytest.mark.parametrize("backend", [pytest.param(name, marks=marks[name]) for name in names])


each_backend = backends("triton", "cuda", "torch")
# those with kernels of their own
each_kernel_backend = backends("triton", "cuda")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def importable(name):
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def moved(batch):
    bias = None if batch.bias is None else batch.bias.to(DEVICE)
    return Batch(batch.hidden.to(DEVICE), batch.weight.to(DEVICE), batch.labels.to(DEVICE), bias)


def on_device(function, batch, upstream, **options):
    """`evaluate` with everything on the GPU, its results in CPU memory."""
    sent = {name: value.to(DEVICE) for name, value in upstream.items()}
    return {name: value.cpu() for name, value in evaluate(function, moved(batch), sent, **options).items()}
