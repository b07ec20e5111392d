"""Objectives by name, for `fused_spo_loss(loss="...")` and the command line."""

from dataclasses import fields
from typing import Any

from spo_kernels.losses.dpo import DPO
from spo_kernels.losses.pairs import Objective
from spo_kernels.losses.spo import SPO
from spo_kernels.losses.wpo import WPO

LOSSES: dict[str, type] = {"dpo": DPO, "spo": SPO, "wpo": WPO}

# made once: torch.compile can look an objective up, but cannot trace a dataclass's construction and checks
_DEFAULTS: dict[str, Objective] = {name: loss() for name, loss in LOSSES.items()}


def named_loss(name: str) -> Objective:
    """The objective of that name with its default hyperparameters.

    Raises:
        ValueError: Unknown name; the message lists those that exist.
    """
    if name not in _DEFAULTS:
        raise ValueError(f"loss = {name!r} is unknown; expected one of {', '.join(sorted(LOSSES))}")
    return _DEFAULTS[name]


def build_loss(name: str, **hyperparameters: Any) -> Objective:
    """The objective of that name, e.g. `build_loss("spo", base="dpo", beta=0.1, weight=0.5)`.

    Hyperparameters of a wrapper that it does not have itself go to its base; `base` is a name or an objective.

    Raises:
        ValueError: Unknown name or hyperparameter; the message lists those that exist.
    """
    named_loss(name)
    own = {field.name for field in fields(LOSSES[name])}
    foreign = {key: value for key, value in hyperparameters.items() if key not in own}
    chosen = {key: value for key, value in hyperparameters.items() if key in own}
    if "base" in own:
        base = chosen.get("base", "dpo")
        if isinstance(base, str):
            named_loss(base)
            bases = {field.name for field in fields(LOSSES[base])}
            chosen["base"] = build_loss(base, **{key: foreign.pop(key) for key in bases & foreign.keys()})
            own |= bases
    if foreign:
        raise ValueError(
            f"loss {name!r} has no hyperparameter {', '.join(sorted(foreign))}; it has {', '.join(sorted(own))}"
        )
    return LOSSES[name](**chosen)
