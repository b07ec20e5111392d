"""TRL, where it is installed, with its own functions again after each test."""

from collections.abc import Iterator
from types import ModuleType

import pytest
from one_thread import one_thread  # noqa: F401 (a fixture of every test here)

from spo_kernels.integrations.trl import unpatch_trl


@pytest.fixture
def trl_utils() -> Iterator[ModuleType]:
    """TRL's module with the fused head. On a CPU, TRL's own head needs 1.16."""
    pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 or newer is not installed")
    from trl.trainer import utils

    yield utils
    unpatch_trl()
