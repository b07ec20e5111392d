"""Builds the C++ and the CUDA extension on first use with ninja, under a lock, into a cache folder.

`setup.py` takes recipes from here, so that there is one list of sources and flags of each. It runs where neither
torch nor filelock is installed.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from spo_kernels.backends import environment

SOURCES = (
    "csrc/bindings.cpp",
    "csrc/cpu/instruction_set.cpp",
    "csrc/cpu/pair_loss.cpp",
    "csrc/cpu/product.cpp",
    "csrc/cpu/product_avx2.cpp",
    "csrc/cpu/product_avx512.cpp",
    "csrc/cpu/product_avx512_bf16.cpp",
    "csrc/cpu/tiles.cpp",
)
HEADERS = (
    "csrc/cpu/instruction_set.h",
    "csrc/cpu/math.h",
    "csrc/cpu/pair_loss.h",
    "csrc/cpu/product.h",
    "csrc/cpu/product_avx512.h",
    "csrc/cpu/product_blocks.h",
    "csrc/cpu/team.h",
    "csrc/cpu/tiles.h",
    "csrc/pair_terms.h",
    "csrc/scalar.h",
    "csrc/tile.h",
)
# no errno and no traps: what lets the compiler vectorise selects and square roots; results stay IEEE
FLAGS = ("-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-g0")

CUDA_SOURCES = (
    "csrc/bindings_cuda.cpp",
    "csrc/cuda/pair_loss.cu",
    "csrc/cuda/probe.cu",
    "csrc/cuda/scale_rows.cu",
    "csrc/cuda/tile_grad.cu",
    "csrc/cuda/tile_stats.cu",
)
CUDA_HEADERS = (
    "csrc/cuda/device.cuh",
    "csrc/cuda/tiles.h",
    "csrc/pair_terms.h",
    "csrc/scalar.h",
    "csrc/tile.h",
)
CUDA_FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Wno-deprecated-gpu-targets")
# compute_100 is the newest that every later architecture can take as PTX, 11.0 included
CUDA_ARCHITECTURES = "80;90;100+PTX;120"


class BuildError(RuntimeError):
    """The extension could not be built; the message says why."""


def source_root() -> Path:
    """The folder that holds `csrc`: the package's own copy, else the checkout around the package."""
    package = Path(__file__).resolve().parents[1]
    return package if (package / "csrc").is_dir() else package.parent


def compiler() -> str | None:
    """The C++ compiler to use: CXX, else the usual names on PATH."""
    for name in (environment.cxx(), "c++", "g++", "clang++"):
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


@dataclass(frozen=True)
class Recipe:
    """How a module is made: one compile command for each source, one that links.

    Commands hold `$in` and `$out`; `identity` is what the result depends on beside sources and commands.
    """

    module: str
    root: Path
    sources: tuple[str, ...]
    headers: tuple[str, ...]
    compile: dict[str, str]  # by the source's suffix
    link: str
    identity: tuple[str, ...]

    def key(self) -> str:
        """A digest of everything that the result depends on."""
        digest = hashlib.sha256()
        commands = [*self.compile.values(), self.link]
        for part in (sys.version, os.uname().machine, *self.identity, *commands):
            digest.update(part.encode())
        for name in (*self.sources, *self.headers):
            digest.update((self.root / name).read_bytes())
        return digest.hexdigest()[:20]


def cpu_recipe() -> Recipe:
    """`_C`, the CPU kernels.

    Raises:
        BuildError: No compiler, no pybind11 or no sources.
    """
    cxx = _checked_compiler()
    flags = " ".join([cxx, *FLAGS, *openmp_flags(cxx), *pybind11_flags()])
    return Recipe(
        module="_C",
        root=_checked_root(*SOURCES, *HEADERS),
        sources=SOURCES,
        headers=HEADERS,
        compile={".cpp": f"{flags} -fPIC -c $in -o $out"},
        link=f"{flags} -fPIC -shared $in -o $out",
        identity=(_version(cxx),),
    )


def cuda_recipe(architectures: str) -> Recipe:
    """`_C_cuda`, the CUDA kernels for `architectures`, e.g. "80;90+PTX".

    The CUDA runtime is linked into the module and its symbols hidden, so that torch may bring another version.

    Raises:
        BuildError: No nvcc, no compiler, no pybind11, no sources, or `architectures` is something else.
    """
    found = nvcc()
    if found is None:
        raise BuildError(NO_NVCC)
    cxx = _checked_compiler()
    device = f"{found} -ccbin {cxx.split()[0]}"
    return Recipe(
        module="_C_cuda",
        root=_checked_root(*CUDA_SOURCES, *CUDA_HEADERS),
        sources=CUDA_SOURCES,
        headers=CUDA_HEADERS,
        compile={
            ".cpp": " ".join([cxx, *FLAGS, "-fPIC", *pybind11_flags(), "-c $in -o $out"]),
            ".cu": " ".join([device, *CUDA_FLAGS, *gencode_flags(architectures), "-c $in -o $out"]),
        },
        link=f"{device} -shared -cudart static -Xlinker --exclude-libs=ALL $in -o $out",
        identity=(_version(cxx), _version(found)),
    )


NO_NVCC = "there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"


def nvcc() -> str | None:
    """The CUDA compiler: CUDA_HOME's, else the one on PATH, else the usual folder's."""
    home = environment.cuda_home()
    folders = [f"{home}/bin"] if home else []
    folders += [environment.search_path(), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def gencode_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list like "80;90+PTX": machine code for each, and PTX where that is asked for.

    Raises:
        BuildError: An entry is something else.
    """
    flags = []
    for entry in architectures.split(";"):
        matched = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", entry.strip())
        if matched is None:
            raise BuildError(f"SPO_CUDA_ARCHS = {architectures!r}: expected numbers like 80;90+PTX, got {entry!r}")
        number = matched[1] + matched[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if matched[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def architecture_of(capability: tuple[int, int]) -> str:
    """The entry for one device: its own, or PTX of the newest before it that nvcc knows.

    Raises:
        BuildError: No nvcc, or it knows none.
    """
    wanted = 10 * capability[0] + capability[1]
    known = [number for number in _nvcc_knows() if number <= wanted]
    if not known:
        raise BuildError(f"{nvcc()} knows no architecture for compute capability {capability[0]}.{capability[1]}")
    return str(wanted) if wanted in known else f"{max(known)}+PTX"


def known_architectures() -> str:
    """Those of CUDA_ARCHITECTURES that nvcc knows; 10.0 and 12.0 came with CUDA 12.8. PTX of the last at least.

    Raises:
        BuildError: No nvcc, or it knows none.
    """
    known = _nvcc_knows()
    entries = [entry for entry in CUDA_ARCHITECTURES.split(";") if int(entry.removesuffix("+PTX")) in known]
    if not entries:
        raise BuildError(f"{nvcc()} knows none of {CUDA_ARCHITECTURES}")
    return ";".join(entries) if "+PTX" in str(entries) else ";".join(entries) + "+PTX"


def _nvcc_knows() -> list[int]:
    found = nvcc()
    if found is None:
        raise BuildError(NO_NVCC)
    listed = subprocess.run([found, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return [int(number) for number in re.findall(r"compute_(\d+)\b", listed)]


def _checked_compiler() -> str:
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler on PATH")
    return cxx


def _checked_root(*names: str) -> Path:
    root = source_root()
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise BuildError(f"source {missing[0]} is not installed")
    return root


def pybind11_flags() -> list[str]:
    """Where a compiler finds the headers of Python and pybind11.

    Raises:
        BuildError: pybind11 is not installed.
    """
    if importlib.util.find_spec("pybind11") is None:
        raise BuildError("pybind11 is not installed (pip install pybind11)")
    import pybind11

    return [f"-isystem {path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]


def _version(command: str) -> str:
    return subprocess.run([*command.split(), "--version"], capture_output=True, text=True).stdout


def load_or_build(recipe: Recipe) -> ModuleType:
    """The extension from the cache, built first if need be.

    Raises:
        BuildError: No ninja, a cache folder that cannot be written, or the compiler failed.
    """
    folder = environment.cache_dir() / recipe.key()
    library = folder / f"{recipe.module}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.is_file():
        return _import_from(library, recipe.module)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), tempfile.TemporaryDirectory(dir=folder) as scratch:
            if not library.is_file():
                run_ninja(recipe, Path(scratch), Path(scratch, "unfinished.so"))
                # other processes look only for the final name, so they never see a half-written library
                os.replace(Path(scratch, "unfinished.so"), library)
    except OSError as error:
        raise BuildError(f"cannot write to the cache folder {folder}: {error}") from error
    return _import_from(library, recipe.module)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, other processes that want the same wait; on a file system without locks each makes its own."""
    from filelock import FileLock

    lock = FileLock(folder / "lock")
    with suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def run_ninja(recipe: Recipe, folder: Path, library: Path) -> str:
    """Make `library`, with everything on the way to it in `folder`; what the compilers said.

    Raises:
        BuildError: No ninja, or a compiler failed.
    """
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), environment.search_path()]))
    if ninja is None:
        raise BuildError("ninja is not installed (pip install ninja)")
    objects = {name: Path(name).name + ".o" for name in recipe.sources}
    lines = []
    for suffix, command in recipe.compile.items():
        lines += [f"rule compile{suffix}", f"  command = {command}"]
    lines += ["rule link", f"  command = {recipe.link}"]
    headers = " ".join(str(recipe.root / name) for name in recipe.headers)
    lines += [
        f"build {target}: compile{Path(name).suffix} {recipe.root / name} | {headers}"
        for name, target in objects.items()
    ]
    lines += [f"build {library}: link {' '.join(objects.values())}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    result = subprocess.run([ninja, "-C", str(folder)], capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"the compiler failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def _import_from(library: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"spo_kernels.{name}", library)
    if spec is None or spec.loader is None:
        raise BuildError(f"{library} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"{library} does not load: {error}") from error
    return module
