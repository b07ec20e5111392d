"""Loads the C++ extension: the one installed with the package, else one built on first use."""

import importlib
from functools import cache
from types import ModuleType

from spo_kernels.backends import build, environment


@cache
def load() -> tuple[ModuleType | None, str]:
    """The extension module and what it is, or None and why it is missing.

    Raises:
        ValueError: SPO_CPU_ISA names no instruction set, or one that this processor lacks.
    """
    wanted = environment.cpu_instruction_set()
    try:
        module, origin = importlib.import_module("spo_kernels._C"), "prebuilt"
    except ImportError as prebuilt_error:
        if environment.jit_disabled():
            return None, f"no usable prebuilt extension ({prebuilt_error}), and SPO_DISABLE_JIT is set"
        try:
            module, origin = build.load_or_build(build.cpu_recipe()), "built on first use"
        except build.BuildError as build_error:
            return None, f"no usable prebuilt extension ({prebuilt_error}), and none could be built: {build_error}"
    if wanted is not None:
        try:
            module.use_instruction_set(wanted)
        except ValueError as error:
            raise ValueError(f"SPO_CPU_ISA = {wanted!r}: {error}") from error
    threads = "OpenMP" if module.openmp else "one thread"
    return module, f"{origin}, {module.instruction_set()}, {threads}"
