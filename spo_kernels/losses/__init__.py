"""Preference objectives: each a frozen dataclass, callable on sequence log-probabilities, written once."""

from spo_kernels.losses.dpo import DPO
from spo_kernels.losses.pairs import Objective, PairLogps, implicit_rewards
from spo_kernels.losses.registry import LOSSES, build_loss, named_loss
from spo_kernels.losses.spo import SPO
from spo_kernels.losses.wpo import WPO

__all__ = ["DPO", "LOSSES", "SPO", "WPO", "Objective", "PairLogps", "build_loss", "implicit_rewards", "named_loss"]
