"""The tests against other versions of torch, Triton and transformers, each in an environment of its own.

`python tests/versions.py --torch 2.11 2.15 tests/test_loss.py`: environments are made one after the other, and deleted
before the next. torch brings the Triton that it was built for, and of a CUDA build some 5 GB. Needs no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TRANSFORMERS = "5.24.0"


class Versions(NamedTuple):
    """What goes together."""

    torch: str
    triton: str
    numpy: str | None = None  # where constraints.txt has one that something here cannot use


VERSIONS = [
    Versions("2.11.0", "3.6.0", numpy="2.3.5"),  # later ones make arrays of one element no numbers, which 3.6 takes
    Versions("2.12.1", "3.7.0"),
    Versions("2.13.0", "3.7.1"),
    Versions("2.14.1", "3.8.0"),
    Versions("2.15.0", "3.9.0"),
]
# what is built on torch's own interfaces, on Triton's and on those of the trainers
TESTS = (
    "tests/test_loss.py",
    "tests/test_linear_logprob.py",
    "tests/test_ops.py",
    "tests/test_compile_dynamic.py",
    "tests/test_host_waits.py",
    "tests/test_interpreted.py",
    "tests/test_triton_compile.py",
    "tests/test_strict_products.py",
    "tests/test_paths.py",
    "tests/integrations/test_fused_dpo.py",
    "tests/integrations/test_fsdp.py",
    "tests/train",
)


def main() -> int:
    """How many versions failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", help="arguments of pytest; default: what depends on versions")
    known = [versions.torch for versions in VERSIONS]
    parser.add_argument("--torch", nargs="+", default=known, metavar="VERSION", help=f"of {', '.join(known)}")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-versions", help="of environments and logs")
    parser.add_argument("--processes", default="2", help="that the tests run in")
    chosen = parser.parse_args()
    tests = chosen.tests or TESTS
    wanted = [versions for versions in VERSIONS if versions.torch.startswith(tuple(chosen.torch))]
    if not wanted:
        parser.error(f"--torch: expected some of {', '.join(known)}, got {' '.join(chosen.torch)}")
    chosen.folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(versions, chosen.folder, [*tests, "-n", chosen.processes]) for versions in wanted]
    print("| torch | triton | transformers | tests |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return sum("failed" in row[-1] or "error" in row[-1] for row in rows)


def _row(versions: Versions, folder: Path, tests: list[str]) -> tuple[str, ...]:
    """What was installed, and how the tests ended; logs stay in the folder."""
    place, log = folder / f"torch-{versions.torch}", folder / f"torch-{versions.torch}.log"
    wanted = versions.torch, versions.triton, TRANSFORMERS
    try:
        venv.create(place, clear=True, with_pip=True)
        python = str(place / "bin" / "python")
        with log.open("w") as out:
            for requirements in ([f"torch=={versions.torch}"], [f"triton=={versions.triton}", *_others(versions)]):
                command = [python, "-m", "pip", "install", "-q", "--no-cache-dir", *requirements]
                if subprocess.run(command, stdout=out, stderr=out).returncode:
                    return *wanted, f"not to be had: {log}"
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
            subprocess.run(command, stdout=out, stderr=out, env=environment, cwd=ROOT)
        summary = re.findall(r"^=* ?(\d+ (?:passed|failed|error).*?) in [\d.]+s", log.read_text(), re.MULTILINE)
        return *wanted, summary[-1] if summary else f"error: {log}"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _others(versions: Versions) -> list[str]:
    """The tests' other packages, as constraints.txt has them."""
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned["numpy"] = versions.numpy or pinned["numpy"]
    names = "accelerate datasets filelock huggingface-hub hypothesis matplotlib ninja numpy peft pybind11 pytest"
    names += " pytest-xdist safetensors tqdm trl"
    return [f"transformers=={TRANSFORMERS}", *(f"{name}=={pinned[name]}" for name in names.split())]


if __name__ == "__main__":
    sys.exit(main())
