"""Builds the C++ extension where a compiler is found; without one the package installs and runs without it."""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent


def load_build_module():
    """`spo_kernels/_build.py` by path: importing the package would need torch in the build environment."""
    spec = importlib.util.spec_from_file_location("_spo_build", ROOT / "spo_kernels" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extensions() -> list[Extension]:
    """The CPU extension, or nothing where there is no compiler."""
    build = load_build_module()
    cxx = build.compiler()
    if cxx is None:
        print("spo_kernels: no C++ compiler on PATH; installing without the cpp backend", file=sys.stderr)
        return []
    import pybind11

    openmp = [*build.openmp_flags(cxx)]
    return [
        Extension(
            "spo_kernels._C",
            sources=[*build.SOURCES],
            depends=[*build.HEADERS],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=[*build.FLAGS, *openmp],
            extra_link_args=openmp,
            language="c++",
            optional=True,
        )
    ]


setup(
    ext_modules=extensions(),
    packages=[*find_packages(include=["spo_kernels", "spo_kernels.*"]), "spo_kernels.csrc", "spo_kernels.csrc.cpu"],
    package_dir={"spo_kernels.csrc": "csrc"},
    package_data={
        "spo_kernels": ["py.typed"],
        "spo_kernels.csrc": ["*.cpp"],
        "spo_kernels.csrc.cpu": ["*.cpp", "*.h"],
    },
)
