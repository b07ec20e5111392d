"""SPO_AUTOTUNE=1 in Triton's interpreter, with a stopwatch that only counts."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("SPO_AUTOTUNE") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 and SPO_AUTOTUNE=1 from the start", allow_module_level=True)

from spo_kernels import linear_logprob
from spo_kernels.backends.triton.tile_grad import _tile_grad_kernel
from spo_kernels.backends.triton.tile_stats import _tile_stats_kernel
from spo_kernels.testing import check_linear_logprob, eager_logprob, random_batch


def test_autotuning_leaves_no_trace():
    """Timing a candidate runs the kernel again: the running statistics and the tile must be put back."""
    calls = []

    def timed(call, quantiles):
        calls.append(1)
        call()
        call()
        return [1.0, 1.0, 1.0]

    for kernel in (_tile_grad_kernel, _tile_stats_kernel):
        kernel._do_bench = timed
    batch = random_batch((3, 5), 131, 12, bias=True)
    check_linear_logprob(linear_logprob, batch, backend="triton", outputs=("entropy",))
    with torch.no_grad():
        logp = linear_logprob(batch.hidden, batch.weight, batch.labels, backend="triton")
    assert torch.allclose(logp, eager_logprob(batch.hidden, batch.weight, batch.labels), atol=1e-5)
    assert calls
