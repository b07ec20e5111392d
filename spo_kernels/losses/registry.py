"""Objectives by name, for `fused_spo_loss(loss="...")` and the command line.

TRL's names where TRL has the loss; "sigmoid" is its name for DPO.
"""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from spo_kernels.arguments import check_list
from spo_kernels.losses.alpha_dpo import AlphaDPO, AlphaDPOCode
from spo_kernels.losses.aot import AOT, AOTUnpaired
from spo_kernels.losses.apo import APODown, APOZero
from spo_kernels.losses.asymmetric import BDPO, BPO, DPOP, FlexDPO
from spo_kernels.losses.bco import BCO, BCOPair
from spo_kernels.losses.beta_dpo import BetaDPO
from spo_kernels.losses.cpo import CPO, ORPO
from spo_kernels.losses.discopop import DiscoPOP
from spo_kernels.losses.divergence import ChiPO, FDivergence
from spo_kernels.losses.dpo import DPO
from spo_kernels.losses.dpo_shift import DPOShift, DPOShiftLinear
from spo_kernels.losses.dr_dpo import DrDPO
from spo_kernels.losses.hinge import Hinge, SLiC
from spo_kernels.losses.ipo import IPO
from spo_kernels.losses.kto import KTO
from spo_kernels.losses.label_noise import CDPO, EXO, Robust
from spo_kernels.losses.nca import NCA
from spo_kernels.losses.offsets import ODPO, RDPO
from spo_kernels.losses.pairs import Objective
from spo_kernels.losses.reconstructed.balanced import AdaDPO, BalancedDPO
from spo_kernels.losses.reconstructed.h_dpo import HDPO
from spo_kernels.losses.reconstructed.spo import SPO
from spo_kernels.losses.reconstructed.uncertainty_dpo import UncertaintyDPO
from spo_kernels.losses.rso import RSO
from spo_kernels.losses.sft import RPO, SFT, SFTDPO
from spo_kernels.losses.sgdpo import SGDPO
from spo_kernels.losses.simpo import AlphaPO, SigmoidNorm, SimPO
from spo_kernels.losses.squares import SPPO, CalDPO, SPPOHard
from spo_kernels.losses.state import has_state
from spo_kernels.losses.tdpo import TDPO
from spo_kernels.losses.weighted_sum import WeightedSum
from spo_kernels.losses.wpo import WPO

LOSSES: dict[str, type] = {
    "ada_dpo": AdaDPO,
    "alpha_dpo": AlphaDPO,
    "alpha_dpo_code": AlphaDPOCode,
    "alphapo": AlphaPO,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "apo_down": APODown,
    "apo_zero": APOZero,
    "balanced_dpo": BalancedDPO,
    "bco": BCO,
    "bco_pair": BCOPair,
    "bdpo": BDPO,
    "beta_dpo": BetaDPO,
    "bpo": BPO,
    "cal_dpo": CalDPO,
    "cdpo": CDPO,
    "chi_po": ChiPO,
    "cpo": CPO,
    "discopop": DiscoPOP,
    "dpo": DPO,
    "dpo_shift": DPOShift,
    "dpo_shift_linear": DPOShiftLinear,
    "dpop": DPOP,
    "dr_dpo": DrDPO,
    "exo_pair": EXO,
    "f_divergence": FDivergence,
    "flex_dpo": FlexDPO,
    "h_dpo": HDPO,
    "hinge": Hinge,
    "ipo": IPO,
    "kto": KTO,
    "mpo": WeightedSum,
    "nca_pair": NCA,
    "odpo": ODPO,
    "orpo": ORPO,
    "r_dpo": RDPO,
    "robust": Robust,
    "rpo": RPO,
    "rso": RSO,
    "sft": SFT,
    "sft_dpo": SFTDPO,
    "sgdpo": SGDPO,
    "sigmoid": DPO,
    "sigmoid_norm": SigmoidNorm,
    "simpo": SimPO,
    "slic": SLiC,
    "spo": SPO,
    "sppo": SPPO,
    "sppo_hard": SPPOHard,
    "tdpo": TDPO,
    "uncertainty_dpo": UncertaintyDPO,
    "wpo": WPO,
}

# made once: torch.compile can look an objective up, but cannot trace a dataclass's construction and checks
_DEFAULTS: dict[str, Objective] = {name: loss() for name, loss in LOSSES.items()}
_STATEFUL = frozenset(name for name, loss in _DEFAULTS.items() if has_state(loss))


def named_loss(name: str) -> Objective:
    """The objective of that name with its default hyperparameters.

    Raises:
        ValueError: Unknown name; the message lists those that exist. Or the objective has running statistics, which
            one object by name would share between all its users.
    """
    _check_name(name)
    if name in _STATEFUL:
        raise ValueError(
            f"loss = {name!r} keeps running statistics: make it once with build_loss({name!r}) and pass that object"
        )
    return _DEFAULTS[name]


def resolve_objective(loss: str | Objective) -> Objective:
    """The `loss=` argument of `fused_spo_loss`: a name, or an objective as it is.

    Raises:
        TypeError, ValueError: It is neither.
    """
    if isinstance(loss, str):
        return named_loss(loss)
    if not callable(loss) or isinstance(loss, type):
        raise TypeError(f"loss must be a name or an objective, such as DPO(beta=0.1), got {loss!r}")
    return loss


def build_loss(name: str, **hyperparameters: Any) -> Objective:
    """The objective of that name, e.g. `build_loss("spo", base="dpo", beta=0.1, weight=0.5)`.

    `base` of a wrapper and the `objectives` of a sum are names or objectives. Hyperparameters that a wrapper does not
    have itself go to its base, and so do those written "base.NAME"; a sum's go to each of its objectives that has
    them.

    Raises:
        TypeError, ValueError: Unknown name or hyperparameter, and the message lists those that exist; or a value that
            the objective does not take.
    """
    return _build(name, hyperparameters, name, frozenset())


def _build(name: str, given: dict[str, Any], asked: str, outer: frozenset[str]) -> Objective:
    """`outer` are the hyperparameters of the wrappers around it, of which `asked` is the first."""
    _check_name(name)
    own = _own(name)
    chosen = {key: value for key, value in given.items() if key in own}
    foreign = {key: value for key, value in given.items() if key not in own}
    base = chosen.get("base", "dpo")
    if "base" in own and isinstance(base, str):
        foreign = {key.removeprefix("base."): value for key, value in foreign.items()}
        chosen["base"] = _build(base, foreign, asked, outer | own)
        foreign = {}
    elif "objectives" in own:
        parts = chosen.get("objectives", ("dpo", "bco_pair", "sft"))
        check_list("objectives", parts)
        chosen["objectives"] = tuple(
            build_loss(part, **{key: foreign[key] for key in foreign.keys() & _own(part)})
            if isinstance(part, str)
            else part
            for part in parts
        )
        taken = frozenset().union(*(_own(part) for part in parts if isinstance(part, str)))
        own |= taken
        foreign = {key: value for key, value in foreign.items() if key not in taken}
    if foreign:
        raise ValueError(
            f"loss {asked!r} has no hyperparameter {', '.join(sorted(foreign))}; it has "
            f"{', '.join(sorted(outer | own))}"
        )
    return LOSSES[name](**chosen)


def _check_name(name: str) -> None:
    if name not in LOSSES:
        near = get_close_matches(name.lower(), LOSSES, n=1, cutoff=0.8)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"loss = {name!r} is unknown{meant}; expected one of {', '.join(sorted(LOSSES))}")


def _own(name: str) -> frozenset[str]:
    """Hyperparameters of the objective itself."""
    _check_name(name)
    return frozenset(field.name for field in fields(LOSSES[name]) if field.init)
