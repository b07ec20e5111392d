"""Runs the files of `tests/interpreted` in processes whose triton interprets its kernels from the start.

TRITON_INTERPRET must be set before triton is first imported, which another test may have done in this process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent


# autotuning needs an environment of its own; the others are two processes, so that two workers may share them
FILES = {"kernels": ["tiles", "pairs", "sparsity"], "calls": ["primitive", "on_a_gpu"], "autotuning": ["autotuning"]}


@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name):
    # the parent's own options and its place in a distributed run are not the child's
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "SPO_AUTOTUNE": str(int(name == "autotuning"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-W", "ignore::RuntimeWarning"]
    command += [str(ROOT / "tests" / "interpreted" / f"{file}.py") for file in FILES[name]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout)
