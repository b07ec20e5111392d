"""The builds of the C++ kernels for narrower processors than this one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from spo_kernels.backends import cpp_extension
from spo_kernels.backends.registry import load_backend

INSTRUCTION_SETS = ["portable", "avx2", "avx512"]


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The cpp backend with that build; skips where there is none or the processor lacks the instructions."""
    module, detail = cpp_extension.load()
    if module is None:
        pytest.skip(detail)
    before = module.instruction_set()
    try:
        module.use_instruction_set(name)
    except ValueError as error:
        pytest.skip(str(error))
    # the backend asks once which products there are
    load_backend.cache_clear()
    try:
        yield
    finally:
        module.use_instruction_set(before)
        load_backend.cache_clear()
