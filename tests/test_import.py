"""Importing the package is cheap: few calls beyond torch, and nothing loaded but its own modules."""

import functools
import json
import subprocess
import sys

_PROBE = """
import importlib.abc, json, sys
import torch

class Spy(importlib.abc.MetaPathFinder):
    asked = []
    def find_spec(self, name, path, target=None):
        self.asked.append(name)

calls = 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")

sys.meta_path.insert(0, Spy())
before = set(sys.modules)
sys.setprofile(count)
import spo_kernels
sys.setprofile(None)
import spo_kernels.integrations.trl  # TRL itself is for the call
print(json.dumps({"calls": calls, "asked": Spy.asked, "loaded": sorted(set(sys.modules) - before)}))
"""


@functools.cache
def _probe():
    run = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_import_is_fast():
    """Calls, not seconds: a busy machine makes none of them. 85,000 (torch 2.13) take 0.17 s of an EPYC 7003 core."""
    assert 10_000 < _probe()["calls"] < 120_000


def test_import_does_not_even_look_for_other_packages():
    """An attempt that fails here, where triton is absent, would load it where it is present."""
    found = _probe()
    names = {name.split(".")[0] for name in (*found["asked"], *found["loaded"])}
    assert "spo_kernels" in names
    assert not names - {"spo_kernels", "torch"} - sys.stdlib_module_names


def test_public_names():
    import spo_kernels
    import spo_kernels.losses

    for name in ("linear_logprob", "sequence_logps", "fused_spo_loss", "backend_info"):
        assert callable(getattr(spo_kernels, name)), name
        assert getattr(spo_kernels, name).__doc__, name
    for name in ("PairLogps", "DPO", "SPO", "build_loss", "LOSSES"):
        assert hasattr(spo_kernels.losses, name), name


def test_backend_info():
    import spo_kernels

    found = spo_kernels.backend_info()
    assert {"torch", "cpp"} <= found.keys()
    assert found["torch"].available is True
    for status in found.values():
        assert isinstance(status.available, bool)
        assert isinstance(status.detail, str) and status.detail
