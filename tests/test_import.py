"""Importing the package is cheap: under 0.3 s of a processor beyond torch, without triton or transformers."""

import json
import subprocess
import sys

_PROBE = """
import gc, importlib.abc, json, sys, time
import torch
gc.freeze()  # a collection would walk through all of torch, a tenth of a second, wherever it falls

class Spy(importlib.abc.MetaPathFinder):
    asked = []
    def find_spec(self, name, path, target=None):
        self.asked.append(name)

sys.meta_path.insert(0, Spy())
start = time.process_time()
import spo_kernels
seconds = time.process_time() - start
import spo_kernels.integrations.trl  # TRL itself is for the call
print(json.dumps({"seconds": seconds, "asked": Spy.asked, "loaded": sorted(sys.modules)}))
"""


def _probe():
    run = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_import_is_fast():
    assert any(_probe()["seconds"] < 0.3 for _ in range(3))


def test_import_does_not_even_look_for_triton_or_transformers():
    """An attempt that fails here, where triton is absent, would load it where it is present."""
    found = _probe()
    names = {name.split(".")[0] for name in (*found["asked"], *found["loaded"])}
    assert "spo_kernels" in names
    assert not names & {"triton", "transformers", "datasets", "accelerate", "trl", "peft"}


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
