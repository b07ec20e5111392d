"""Builds the C++ extension on first use with ninja, under a lock, into a cache folder.

`setup.py` takes sources and flags from here, so that there is one list of each.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

SOURCES = (
    "csrc/bindings.cpp",
    "csrc/cpu/product.cpp",
    "csrc/cpu/product_avx2.cpp",
    "csrc/cpu/product_avx512.cpp",
    "csrc/cpu/tiles.cpp",
)
HEADERS = ("csrc/cpu/math.h", "csrc/cpu/product.h", "csrc/cpu/product_blocks.h", "csrc/cpu/tiles.h")
# no errno and no traps: what lets the compiler vectorise selects and square roots; results stay IEEE
FLAGS = ("-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-g0")


class BuildError(RuntimeError):
    """The extension could not be built; the message says why."""


def source_root() -> Path:
    """The folder that holds `csrc`: the package's own copy, else the checkout around the package."""
    package = Path(__file__).resolve().parent
    return package if (package / "csrc").is_dir() else package.parent


def compiler() -> str | None:
    """The C++ compiler to use: CXX, else the usual names on PATH."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def openmp_flags(cxx: str) -> tuple[str, ...]:
    """`-fopenmp` where a program using it compiles and links, else nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*cxx.split(), "-fopenmp", str(source), "-o", str(Path(folder, "probe"))]
        works = subprocess.run(command, capture_output=True).returncode == 0
    return ("-fopenmp",) if works else ()


def load_or_build() -> ModuleType:
    """The extension from the cache, built first if need be.

    Raises:
        BuildError: No compiler, no pybind11, no ninja, no sources, or the compiler failed.
    """
    from spo_kernels import _env

    root = source_root()
    missing = [name for name in (*SOURCES, *HEADERS) if not (root / name).is_file()]
    if missing:
        raise BuildError(f"source {missing[0]} is not installed")
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler on PATH")
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if ninja is None:
        raise BuildError("ninja is not installed (pip install ninja)")
    if importlib.util.find_spec("pybind11") is None:
        raise BuildError("pybind11 is not installed (pip install pybind11)")
    folder = _env.cache_dir() / _cache_key(root, cxx)
    library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.is_file():
        _build(root, cxx, ninja, folder, library)
    return _import_from(library)


def _cache_key(root: Path, cxx: str) -> str:
    version = subprocess.run([*cxx.split(), "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256()
    for part in (sys.version, os.uname().machine, cxx, version, *FLAGS):
        digest.update(part.encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()[:20]


def _build(root: Path, cxx: str, ninja: str, folder: Path, library: Path) -> None:
    import fcntl

    import pybind11

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    except OSError as error:
        raise BuildError(f"cannot write to the cache folder {folder}: {error}") from error
    with open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.is_file():
            return
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        flags = [*FLAGS, "-fPIC", *openmp_flags(cxx), *(f"-isystem {path}" for path in includes)]
        objects = {name: Path(name).stem + ".o" for name in SOURCES}
        lines = [f"cxx = {cxx}", f"flags = {' '.join(flags)}"]
        lines += ["rule compile", "  command = $cxx $flags -c $in -o $out"]
        lines += ["rule link", "  command = $cxx $flags -shared $in -o $out"]
        lines += [f"build {target}: compile {root / name}" for name, target in objects.items()]
        lines += [f"build unfinished.so: link {' '.join(objects.values())}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        result = subprocess.run([ninja, "-C", str(folder)], capture_output=True, text=True)
        if result.returncode != 0:
            raise BuildError(f"the compiler failed:\n{result.stdout}{result.stderr}")
        # other processes look only for the final name, so they never see a half-written library
        os.replace(folder / "unfinished.so", library)


def _import_from(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("spo_kernels._C", library)
    if spec is None or spec.loader is None:
        raise BuildError(f"{library} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"{library} does not load: {error}") from error
    return module
