"""Where the GPU tests run, and what they share.

With SPO_GPU_DRY_RUN=1 and TRITON_INTERPRET=1 what needs no CUDA runs on the CPU: a check of the tests themselves.
"""

import os

import pytest
import torch

from spo_kernels import backend_info
from spo_kernels.testing import Batch, evaluate

DRY = os.environ.get("SPO_GPU_DRY_RUN") == "1"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cpu" if DRY else "cuda")

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not (CUDA or DRY), reason="torch sees no NVIDIA or AMD GPU")]
needs_cuda = pytest.mark.skipif(not CUDA, reason="torch sees no NVIDIA or AMD GPU")
_BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not backend_info()[name].available, reason=backend_info()[name].detail))
    for name in ("triton", "torch")
]
each_backend = pytest.mark.parametrize("backend", _BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def moved(batch):
    bias = None if batch.bias is None else batch.bias.to(DEVICE)
    return Batch(batch.hidden.to(DEVICE), batch.weight.to(DEVICE), batch.labels.to(DEVICE), bias)


def on_device(function, batch, upstream, **options):
    """`evaluate` with everything on the GPU, its results in CPU memory."""
    sent = {name: value.to(DEVICE) for name, value in upstream.items()}
    return {name: value.cpu() for name, value in evaluate(function, moved(batch), sent, **options).items()}
