"""Whole calls with the builds of the C++ kernels for narrower processors, and the choice between the builds.

The accuracy contract itself runs with each by `SPO_CPU_ISA=avx2 python -m pytest tests/test_accuracy.py`.
"""

import os
import subprocess
import sys

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, instruction_set

from spo_kernels import fused_spo_loss, linear_logprob
from spo_kernels.backends import cpp_extension
from spo_kernels.losses import SPO
from spo_kernels.testing import check_linear_logprob, peaked_batch, random_batch

ALL_OUTPUTS = ("lse", "correct", "entropy", "log_sum_p2")
each_build = pytest.mark.parametrize("build", INSTRUCTION_SETS)


@each_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_logprob(build, dtype):
    with instruction_set(build):
        for batch in (
            random_batch((4, 9), 1500, 40, dtype=dtype, bias=True, ignored=0.3),
            peaked_batch(2, 40, 700, 64, dtype=dtype, spread=4.0),
        ):
            check_linear_logprob(linear_logprob, batch, backend="cpp", workspace_bytes=400_000, outputs=ALL_OUTPUTS)


@each_build
def test_three_products(build):
    batch, found = random_batch((4, 9), 131, 12, dtype=torch.float32, ignored=0.2), []
    with instruction_set(build):
        for backend in ("cpp", "torch"):
            hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
            value, _ = fused_spo_loss(
                hidden, weight, batch.labels, loss=SPO(), ref_logps=torch.zeros(4), path="factorised", backend=backend
            )
            value.backward()
            found.append((value.detach(), hidden.grad, weight.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


@each_build
def test_products_follow(build):
    with instruction_set(build):
        module, _ = cpp_extension.load()
        assert module is not None
        names = set(module.product_names())
    allowed = {"portable": set(), "avx2": {"avx2"}, "avx512": {"avx2", "avx512", "avx512_bf16"}}[build]
    assert names <= allowed and (build == "portable" or build in names)


def said(value: str) -> str:
    """What a new process reports of the backend with SPO_CPU_ISA = value."""
    program = "import spo_kernels; print(spo_kernels.backend_info()['cpp'].detail)"
    environment = os.environ | {"SPO_CPU_ISA": value, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100)
    return done.stdout + done.stderr


def test_choice_by_environment(monkeypatch):
    if cpp_extension.load()[0] is None:
        pytest.skip(cpp_extension.load()[1])
    assert ", portable, " in said("portable")
    monkeypatch.setenv("SPO_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="SPO_CPU_ISA = 'sse9'; expected portable, avx2 or avx512"):
        cpp_extension.load.__wrapped__()
    monkeypatch.setenv("SPO_CPU_ISA", "avx512")

    class Narrow:
        def use_instruction_set(self, name):
            raise ValueError("this processor has no avx512, its widest is avx2")

    monkeypatch.setitem(sys.modules, "spo_kernels._C", Narrow())
    with pytest.raises(ValueError, match="SPO_CPU_ISA = 'avx512': this processor has no avx512, its widest is avx2"):
        cpp_extension.load.__wrapped__()
