"""Preference objectives: each a frozen dataclass, callable on sequence log-probabilities, written once."""

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
from spo_kernels.losses.needs import needs_inputs, needs_reference
from spo_kernels.losses.offsets import ODPO, RDPO, odpo_offsets
from spo_kernels.losses.pairs import Objective, PairLogps, implicit_rewards
from spo_kernels.losses.reconstructed.balanced import AdaDPO, BalancedDPO
from spo_kernels.losses.reconstructed.h_dpo import HDPO
from spo_kernels.losses.reconstructed.spo import SPO
from spo_kernels.losses.reconstructed.uncertainty_dpo import UncertaintyDPO
from spo_kernels.losses.registry import LOSSES, build_loss, named_loss
from spo_kernels.losses.rso import RSO
from spo_kernels.losses.sft import RPO, SFT, SFTDPO
from spo_kernels.losses.sgdpo import SGDPO
from spo_kernels.losses.simpo import AlphaPO, SigmoidNorm, SimPO
from spo_kernels.losses.squares import SPPO, CalDPO, SPPOHard
from spo_kernels.losses.tdpo import TDPO
from spo_kernels.losses.weighted_sum import WeightedSum
from spo_kernels.losses.wpo import WPO

__all__ = [
    "AOT",
    "BCO",
    "BDPO",
    "BPO",
    "CDPO",
    "CPO",
    "DPO",
    "DPOP",
    "EXO",
    "HDPO",
    "IPO",
    "KTO",
    "LOSSES",
    "NCA",
    "ODPO",
    "ORPO",
    "RDPO",
    "RPO",
    "RSO",
    "SFT",
    "SFTDPO",
    "SGDPO",
    "SPO",
    "SPPO",
    "TDPO",
    "WPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "AdaDPO",
    "AlphaDPO",
    "AlphaDPOCode",
    "AlphaPO",
    "BCOPair",
    "BalancedDPO",
    "BetaDPO",
    "CalDPO",
    "ChiPO",
    "DPOShift",
    "DPOShiftLinear",
    "DiscoPOP",
    "DrDPO",
    "FDivergence",
    "FlexDPO",
    "Hinge",
    "Objective",
    "PairLogps",
    "Robust",
    "SLiC",
    "SPPOHard",
    "SigmoidNorm",
    "SimPO",
    "UncertaintyDPO",
    "WeightedSum",
    "build_loss",
    "implicit_rewards",
    "named_loss",
    "needs_inputs",
    "needs_reference",
    "odpo_offsets",
]
