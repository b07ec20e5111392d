"""Where TRL's trainers call their fused LM head: what is known of it, and whether the installed TRL is like that."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from types import CodeType, ModuleType
from typing import Any

import torch

from spo_kernels.integrations.trl_head import OPTIONAL_OUTPUTS, FusedHead

TESTED = ("1.15.0", "1.16.0")
MODULE = "trl.trainer.utils"
HEAD = "_ChunkedLogProbFunction"
# whether the head is given only the tokens that have labels; TRL 1.15 has no choice
COMPACTS = "_use_triton"
_METHODS = {
    "_compute_loss": ("model", "inputs", "return_outputs"),
    "compute_ref_log_probs": ("model", "inputs"),
    "_precompute_ref_logps": ("dataset", "name", "batch_size"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_save_checkpoint": ("model", "trial"),
    "_set_signature_columns_if_needed": (),
}


def find_seam() -> tuple[ModuleType, dict[str, Any]]:
    """TRL's module that looks the head up by name at each call, and what to put at which of its names.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: It is not as known here.
    """
    version = trl_version()
    module = import_module(MODULE)
    unknown = _unknown(module)
    if unknown is not None:
        raise RuntimeError(
            f"patch_trl() does not know the fused head of TRL {version}: {unknown}. It was tested with TRL "
            f"{' and '.join(TESTED)}"
        )
    replacements: dict[str, Any] = {HEAD: FusedHead}
    if hasattr(module, COMPACTS):
        replacements[COMPACTS] = _labelled_tokens_only
    return module, replacements


def check_dpo_trainer(trainer: type) -> None:
    """Raise RuntimeError unless TRL's `DPOTrainer` has the methods that `FusedDPOTrainer` puts its own in place of."""
    for name, expected in _METHODS.items():
        method = getattr(trainer, name, None)
        taken = _names(method)[1:] if callable(method) else None
        if taken != list(expected):
            found = "there is none" if taken is None else f"it takes {', '.join(taken)}"
            raise RuntimeError(
                f"FusedDPOTrainer does not know the DPOTrainer of TRL {trl_version()}: expected "
                f"{name}({', '.join(expected)}), {found}. It was tested with TRL {' and '.join(TESTED)}"
            )


def trl_version() -> str:
    """The installed TRL's.

    Raises:
        ImportError: There is none.
    """
    try:
        return import_module("trl").__version__
    except ImportError as error:
        tested = " or ".join(TESTED)
        raise ImportError(
            f"spo_kernels.integrations.trl needs TRL ({tested}), which cannot be imported: {error}"
        ) from error


def _labelled_tokens_only(device: torch.device) -> bool:
    return True


def _unknown(module: ModuleType) -> str | None:
    """What is not as expected, or None."""
    function = getattr(module, HEAD, None)
    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        return f"{MODULE}.{HEAD} is {function!r}, not an autograd function"
    taken = inspect.signature(function.forward).parameters
    expected = _names(FusedHead.apply)
    if list(taken)[1:] != expected:
        return f"{HEAD} takes {', '.join(list(taken)[1:])}, not {', '.join(expected)}"
    offered = taken["outputs"].default
    if offered != OPTIONAL_OUTPUTS:
        return f"{HEAD} offers the outputs {offered}, not {OPTIONAL_OUTPUTS}"
    caller = getattr(module, "add_fused_lm_head", None)
    if HEAD not in _globals_read(getattr(caller, "__code__", None)):
        return f"{MODULE}.add_fused_lm_head does not call {HEAD}"
    if hasattr(module, COMPACTS) and _names(getattr(module, COMPACTS)) != _names(_labelled_tokens_only):
        return f"{MODULE}.{COMPACTS} takes {', '.join(_names(getattr(module, COMPACTS)))}"
    return None


def _names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _globals_read(code: CodeType | None) -> Iterator[str]:
    """Names that a function, or a function inside it, looks up."""
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _globals_read(constant)
