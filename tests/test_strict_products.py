"""Products keep their precision where the process allows torch to round, and the process keeps its settings."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spo_kernels import fused_spo_loss
from spo_kernels.backends.strict import strict
from spo_kernels.testing import random_batch

GPU = torch.device("cuda")
CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def allow(name):
    """One of the ways in which a program does."""
    if name == "allow_tf32":
        CUDA.allow_tf32 = True
    elif name == "every backend":
        torch.backends.fp32_precision = "tf32"
    elif name == "fp32_precision":
        CUDA.fp32_precision = CPU.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision(name)


@pytest.fixture(autouse=True)
def _put_back():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    CUDA.fp32_precision = CPU.fp32_precision = "none"
    CUDA.allow_fp16_accumulation = False
    CUDA.allow_bf16_reduced_precision_reduction = True


def settings():
    found = [CUDA.fp32_precision, CPU.fp32_precision, CUDA.allow_fp16_accumulation]
    for read in (torch.get_float32_matmul_precision, lambda: CUDA.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:  # torch's, where the old and the new names were used
            found.append("mixed")
    return found


class AtProducts(TorchDispatchMode):
    """The CPU's setting as each product sees it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.seen.append(CPU.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["packed", "factorised", "two_pass"])
def test_every_product_of_a_loss(path):
    batch = random_batch((4, 5), 64, 16, dtype=torch.float32)
    allow("medium")
    with AtProducts() as products:
        tensors = batch.hidden.requires_grad_(), batch.weight.requires_grad_(), batch.labels
        loss, _ = fused_spo_loss(*tensors, loss="dpo", ref_logps=torch.zeros(4), path=path, backend="torch")
        loss.backward()
    assert len(products.seen) >= 3 and set(products.seen) == {"ieee"}
    assert CPU.fp32_precision == "bf16" and torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("name", ["high", "medium", "allow_tf32", "fp32_precision", "every backend"])
def test_settings_on_a_gpu(name):
    allow(name)
    CUDA.allow_fp16_accumulation = True
    before = settings()
    assert before[0] == "tf32"
    with pytest.raises(ZeroDivisionError), strict(GPU, torch.float32, torch.float32):
        assert CUDA.fp32_precision == "ieee" and CUDA.allow_fp16_accumulation
        raise ZeroDivisionError
    assert settings() == before
    with strict(GPU, torch.float16, torch.float32):
        assert CUDA.fp32_precision == "tf32" and not CUDA.allow_fp16_accumulation
    assert settings() == before
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float64,) * 2):  # which no setting of torch's rounds
        with strict(GPU, *dtypes):
            assert settings() == before


@pytest.mark.parametrize("allowed", [True, False])
def test_partial_sums_of_a_bfloat16_result(allowed):
    CUDA.allow_bf16_reduced_precision_reduction = allowed
    with strict(GPU, torch.bfloat16, torch.bfloat16):
        assert not CUDA.allow_bf16_reduced_precision_reduction
    assert CUDA.allow_bf16_reduced_precision_reduction == allowed


def test_one_that_followed_every_backend_goes_on_to():
    allow("every backend")
    with strict(GPU, torch.float32, torch.float32):
        pass
    torch.backends.fp32_precision = "ieee"
    assert CUDA.fp32_precision == "ieee"


def test_overlapping_threads():
    """Each begins before the other ends: the settings come back with the last."""
    allow("high")
    entered, left = threading.Event(), threading.Event()
    seen = []

    def other():
        with strict(GPU, torch.float32, torch.float32):
            entered.set()
            left.wait(60)
            seen.append(CUDA.fp32_precision)

    thread = threading.Thread(target=other)
    with strict(GPU, torch.float32, torch.float32):
        thread.start()
        assert entered.wait(60)
    left.set()
    thread.join(60)
    assert seen == ["ieee"] and CUDA.fp32_precision == "tf32"
    assert torch.get_float32_matmul_precision() == "high"
