"""The products under AddressSanitizer and UndefinedBehaviorSanitizer: ragged shapes, all strides, row lists."""

import os
import subprocess
from pathlib import Path

import pytest

from spo_kernels.backends import build

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-O1", "-g1"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# leaks are looked for with ptrace, which containers often forbid
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "OMP_NUM_THREADS": "3"}


def run(command):
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


@pytest.fixture
def compiler(tmp_path):
    """The command that compiles, where a program made by it with sanitizers runs."""
    cxx = build.compiler()
    if cxx is None:
        pytest.skip("no C++ compiler on PATH")
    command = [*cxx.split(), *FLAGS, *build.openmp_flags(cxx)]
    source, program = tmp_path / "probe.cpp", tmp_path / "probe"
    source.write_text("int main() { return 0; }\n")
    for step in ([*command, *SANITIZERS, str(source), "-o", str(program)], [str(program)]):
        tried = run(step)
        if tried.returncode != 0:
            pytest.skip(f"no program with sanitizers can be made here: {tried.stderr.strip()[-200:]}")
    return command


def test_products_keep_to_their_memory(compiler, tmp_path):
    folder, caller = ROOT / "csrc" / "cpu", ROOT / "tests" / "native" / "products.cpp"
    # the caller's memory is watched all the same; its own sums would take half of the time
    flags = {caller: [], **dict.fromkeys([*folder.glob("product*.cpp"), folder / "instruction_set.cpp"], SANITIZERS)}
    objects = {source: tmp_path / f"{number}.o" for number, source in enumerate(flags)}
    compiling = [
        subprocess.Popen(
            [*compiler, *flags[source], f"-I{folder}", "-c", str(source), "-o", str(made)], stderr=subprocess.PIPE
        )
        for source, made in objects.items()
    ]
    errors = [process.communicate()[1].decode() for process in compiling]
    assert [process.returncode for process in compiling] == [0] * len(compiling), "".join(errors)
    program = tmp_path / "products_test"
    linked = run([*compiler, *SANITIZERS, *map(str, objects.values()), "-o", str(program)])
    assert linked.returncode == 0, linked.stderr
    done = run([str(program)])
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert done.stdout.strip().endswith("products"), done.stdout
