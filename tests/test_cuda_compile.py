"""The CUDA extension compiled and linked for each architecture; needs nvcc and no GPU."""

import importlib.util
import re
import subprocess
from dataclasses import replace

import pytest

from spo_kernels.backends import build

pytestmark = pytest.mark.skipif(build.nvcc() is None, reason=build.NO_NVCC)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# two blocks of 512 threads, or four of 256, share the 65536 registers of a multiprocessor
REGISTERS = {"tile_stats": 64, "tile_grad": 64, "scale_rows": 64, "pair_loss": 64, "probe": 16}
# dtypes of tile and operand, with and without the optional outputs
KERNELS = {"tile_stats": 16, "tile_grad": 10, "scale_rows": 3, "pair_loss": 1, "probe": 1}

_ENTRY = re.compile(
    r"Compiling entry function '\w*?(?P<name>[a-z]\w*?)_kernel\w*' for '(?P<arch>sm_\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler on PATH")
def test_every_kernel_for_every_architecture(tmp_path):
    """One test, because the compilers take half a minute. Their warnings are errors; what launches may be slow.

    One PTX for all, as the sources ask for no architecture: to make it is half of the time.
    """
    recipe = build.cuda_recipe("80")
    assert "code=sm_80" in recipe.compile[".cu"]
    device = recipe.compile[".cu"].replace("code=sm_80", f"code='[{','.join(ARCHITECTURES)}]'")
    recipe = replace(recipe, compile={**recipe.compile, ".cu": device})
    strict = {".cpp": " -Wall -Wextra -Werror -O0", ".cu": " -Werror=all-warnings -Xptxas -v -Xcompiler=-O0"}
    recipe = replace(recipe, compile={suffix: command + strict[suffix] for suffix, command in recipe.compile.items()})
    library = tmp_path / "_C_cuda.so"
    report = build.run_ninja(recipe, tmp_path, library)
    check_resources(report)
    check_symbols(library)
    check_without_a_gpu(library)


def check_resources(report):
    """No spill, no stack, no local memory, and registers that let enough threads share a multiprocessor."""
    rows = [match.groupdict() for match in _ENTRY.finditer(report)]
    for architecture in ARCHITECTURES:
        mine = [row for row in rows if row["arch"] == architecture]
        names = [next(name for name in KERNELS if row["name"].endswith(name)) for row in mine]
        assert {name: names.count(name) for name in names} == KERNELS, architecture
        assert [row for row in mine if int(row["stack"]) or int(row["stores"]) or int(row["loads"])] == []
        for name, row in zip(names, mine, strict=True):
            assert int(row["registers"]) <= REGISTERS[name], row
    # local memory that is no stack would be named in a line of its own
    assert "lmem" not in report


def check_symbols(library):
    """Torch brings a CUDA runtime of its own, maybe of another version: neither may find the other's symbols."""
    for option in ("--defined-only", "--undefined-only"):
        symbols = subprocess.run(["nm", "-D", option, library], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"\bcu(da)?[A-Z]\w+", symbols)


def check_without_a_gpu(library):
    """The module loads all the same, and says what is missing."""
    # pybind11 gives a name's first module to all who ask for it: not the emulated one's
    spec = importlib.util.spec_from_file_location("compiled._C_cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # a device that no machine has
    assert "cudaError" in module.why_not(10_000)
    with pytest.raises(RuntimeError, match=r"scale_rows of \[4, 8\] on device 10000: .*cudaError"):
        module.scale_rows((4096, 8, 0), rows=4, columns=8, factors=4096, queue=(10_000, 0))
    with pytest.raises(ValueError, match="2\\^30 columns, got 1099511627776"):
        module.scale_rows((4096, 8, 0), rows=4, columns=2**40, factors=4096, queue=(0, 0))
