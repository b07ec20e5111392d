"""clang-format and clang-tidy over the C++ and CUDA sources: `python tests/lint_cpp.py`, with --fix to reformat.

A tool that is missing, or of another version than constraints.txt names, is left out with a line that says so:
versions differ in what they ask for. CUDA sources are read as the C++ that the emulator's headers make of them.
"""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spo_kernels.backends import build

ROOT = Path(__file__).parent.parent
EMULATOR = ROOT / "tests" / "cuda_emulator"


def tool(name: str) -> str | None:
    """The pinned version beside this Python or on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        print(f"{name}: left out, it is not installed (pip install -c constraints.txt {name})")
        return None
    pinned = re.search(rf"^{name}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    version = re.search(r"version (\S+)", subprocess.run([found, "--version"], capture_output=True, text=True).stdout)
    if pinned is None or version is None or version[1] != pinned[1]:
        print(f"{name}: left out, {version and version[1]} is there and constraints.txt names {pinned and pinned[1]}")
        return None
    return found


def sources(*suffixes: str) -> list[str]:
    """Paths of the files with one of these suffixes."""
    folders = (ROOT / "csrc", EMULATOR)
    return sorted(str(path) for folder in folders for path in folder.rglob("*") if path.suffix in suffixes)


def tidy(clang_tidy: str, source: str) -> tuple[str, bool]:
    """What clang-tidy says of one file, and whether it is content."""
    flags = ["-x", "c++", "-std=c++17", "-fopenmp", f"-I{EMULATOR}"]
    # its default of 225000 nodes a function takes twice the time of all else
    flags += ["-Xclang", "-analyzer-config", "-Xclang", "max-nodes=20000"]
    includes = [word for flag in build.pybind11_flags() for word in flag.split()]
    command = [clang_tidy, "--quiet", source, "--", *flags, *includes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout, done.returncode == 0


def main() -> int:
    clean = True
    if (clang_format := tool("clang-format")) is not None:
        mode = ["-i"] if "--fix" in sys.argv else ["--dry-run", "--Werror"]
        clean = subprocess.run([clang_format, *mode, *sources(".cpp", ".cu", ".cuh", ".h")]).returncode == 0
    if (clang_tidy := tool("clang-tidy")) is not None:
        files = [source for source in sources(".cpp", ".cu") if not source.startswith(str(EMULATOR))]
        with ThreadPoolExecutor(2) as pool:
            for said, content in pool.map(lambda source: tidy(clang_tidy, source), files):
                print(said, end="")
                clean = clean and content
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
