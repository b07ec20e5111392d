"""Builds the C++ extension where a compiler is found and the CUDA extension where nvcc is; the package runs without."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def load_module(name: str) -> ModuleType:
    """A module of `spo_kernels.backends`, without running the package's `__init__`, which would need torch."""
    package = ModuleType("spo_kernels")
    package.__path__ = [str(ROOT / "spo_kernels")]
    sys.modules.setdefault("spo_kernels", package)
    return importlib.import_module(f"spo_kernels.backends.{name}")


build, environment = load_module("build"), load_module("environment")
CPU, CUDA = "spo_kernels._C", "spo_kernels._C_cuda"


def extensions() -> list[Extension]:
    """The CPU extension and the CUDA extension, or nothing where there is no compiler."""
    if build.compiler() is None:
        print("spo_kernels: no C++ compiler on PATH; installing without the cpp backend", file=sys.stderr)
        return []
    cpu = Extension(CPU, sources=[*build.SOURCES], depends=[*build.HEADERS], optional=True)
    skipped = "SPO_SKIP_CUDA_BUILD is set" if environment.cuda_build_skipped() else None
    skipped = skipped or (None if build.nvcc() else build.NO_NVCC)
    if skipped is not None:
        print(f"spo_kernels: {skipped}; installing without a prebuilt cuda backend", file=sys.stderr)
        return [cpu]
    cuda = Extension(CUDA, sources=[*build.CUDA_SOURCES], depends=[*build.CUDA_HEADERS], optional=True)
    return [cpu, cuda]


class BuildExtensions(build_ext):
    """Each is made by its recipe, with ninja: all sources at once."""

    def build_extension(self, extension: Extension) -> None:
        """See `setuptools.command.build_ext`."""
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp, extension.name).resolve()
        for needed in (library.parent, folder):
            needed.mkdir(parents=True, exist_ok=True)
        try:
            if extension.name == CPU:
                recipe = build.cpu_recipe()
            else:
                recipe = build.cuda_recipe(environment.cuda_architectures() or build.known_architectures())
            build.run_ninja(recipe, folder, library)
        except build.BuildError as error:
            raise CompileError(str(error)) from error


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensions},
    packages=[
        *find_packages(include=["spo_kernels", "spo_kernels.*"]),
        "spo_kernels.csrc",
        "spo_kernels.csrc.cpu",
        "spo_kernels.csrc.cuda",
    ],
    package_dir={"spo_kernels.csrc": "csrc"},
    package_data={
        "spo_kernels": ["py.typed"],
        "spo_kernels.csrc": ["*.cpp", "*.h"],
        "spo_kernels.csrc.cpu": ["*.cpp", "*.h"],
        "spo_kernels.csrc.cuda": ["*.cu", "*.cuh", "*.h"],
    },
)
