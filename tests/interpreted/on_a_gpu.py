"""Triton's kernels on tensors that say they are on a GPU, as public calls launch them; also as a graph is recorded."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from cuda_like import CudaLike, interpret_triton, pretend_a_gpu
from gpu_calls import CALLS, near


@pytest.fixture
def gpu(monkeypatch):
    gpu = pretend_a_gpu(monkeypatch)
    interpret_triton(monkeypatch)
    return gpu


@pytest.mark.parametrize("name", CALLS)
def test_every_call(gpu, name):
    call, waits = CALLS[name]
    expected = call(lambda value: value, torch.bfloat16, "torch")
    near(call(CudaLike, torch.bfloat16, "triton"), expected, torch.bfloat16)
    assert gpu.waits == waits
    assert gpu.misaligned == set()
    with gpu.capture():
        near(call(CudaLike, torch.bfloat16, "triton"), expected, torch.bfloat16)
