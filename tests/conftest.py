"""Shared fixtures: one thread budget, deterministic hypothesis, a run per backend, poisoned buffers."""

import gc
import os
import tempfile

# Read when the libraries are imported, by whichever test comes first. No hub is asked, which would cost a
# minute for each unknown name; encoded data go where nothing is left of them.
os.environ["HF_HUB_OFFLINE"] = "1"
# left free, the choice would send most products of the tests' sizes to the vendor's library
os.environ.setdefault("SPO_CPU_PRODUCT", "native")
# DeepSpeed looks for a device when it is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="spo-tests-")

import emulated
import pytest
import torch
from hypothesis import HealthCheck, settings

import spo_kernels
from tests.processes import start_server

emulated_cuda = emulated.emulated_cuda

settings.register_profile(
    "spo", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("spo")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_finish():
    """What the imports made stays: a collection of garbage, which trainers ask for, would walk through it each time.

    Forked processes begin with it.
    """
    gc.collect()
    gc.freeze()
    start_server()


@pytest.fixture(params=["torch", "cpp"], scope="session")
def backend(request):
    """Each tile backend by name; one that is missing is skipped with its own reason."""
    status = spo_kernels.backend_info()[request.param]
    if not status.available:
        pytest.skip(f"{request.param}: {status.detail}")
    return request.param


def _poison(tensor):
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned_buffers(monkeypatch):
    """torch.empty and its relatives return NaN, so that an element nobody wrote shows."""

    def poisoned(allocate):
        return lambda *args, **kwargs: _poison(allocate(*args, **kwargs))

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def threads():
    """torch.set_num_threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
