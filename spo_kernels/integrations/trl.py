"""TRL with this library: `patch_trl` for all its trainers, `FusedDPOTrainer` and `FusedDPOConfig` for preferences."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any

from spo_kernels.integrations.trl_seam import MODULE, TESTED, find_seam, trl_version

_logger = logging.getLogger(__name__)
# TRL's own, by their names in MODULE; empty while nothing is patched
_originals: dict[str, Any] = {}


@dataclass(frozen=True)
class TRLPatch:
    """What `patch_trl` did. As a context manager it undoes that at the end.

    Attributes:
        version: TRL's.
        names: Names of TRL that stand for this library's functions now.
        new: Whether this call replaced them; if they were replaced before, leaving the context changes nothing.
    """

    version: str
    names: tuple[str, ...]
    new: bool

    def __str__(self) -> str:
        return f"TRL {self.version} computes its fused head with spo_kernels: {', '.join(self.names)} replaced"

    def __enter__(self) -> TRLPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.new:
            unpatch_trl()


def patch_trl() -> TRLPatch:
    """Let every TRL trainer whose model has TRL's fused head (DPO, KTO, SFT, GRPO, RLOO) use `linear_logprob`.

    One line before the trainer is made; nothing else in the script changes. Holds for the whole process until
    `unpatch_trl()`, or for a block: `with patch_trl(): ...`. Called again it changes nothing.

    Returns:
        What was replaced, also as a sentence: `print(patch_trl())`.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: TRL's internals are not those that are known; names the versions that were tested.
    """
    new = not _originals
    if new:
        module, replacements = find_seam()
        for name, ours in replacements.items():
            _originals[name] = getattr(module, name)
            setattr(module, name, ours)
    patch = TRLPatch(trl_version(), tuple(f"{MODULE}.{name}" for name in _originals), new)
    if new:
        _logger.info("%s", patch)
        if patch.version not in TESTED:
            warnings.warn(f"{patch}; tested with TRL {' and '.join(TESTED)} only", stacklevel=2)
    return patch


def unpatch_trl() -> None:
    """Give TRL its own functions back; nothing where it has them."""
    for name, original in _originals.items():
        setattr(import_module(MODULE), name, original)
    _originals.clear()


_MADE_OF_TRL = {"FusedDPOTrainer": "trl_dpo", "FusedDPOConfig": "trl_config"}


def __getattr__(name: str) -> Any:
    """`FusedDPOTrainer` and `FusedDPOConfig`, whose bases are TRL's.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: Its `DPOTrainer` is not as known.
    """
    if name not in _MADE_OF_TRL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trl_version()
    return getattr(import_module(f"spo_kernels.integrations.{_MADE_OF_TRL[name]}"), name)
