"""DPO-Shift (arXiv 2502.07599): DPO with the rejected response's log-ratio weighed less.

Agrees with the authors' code (Meaquadddd/DPO-Shift 52eebac9, scripts/dposhift_trainer.py:1093-1125), which has a fixed
λ, linear schedules of it, and label smoothing. λ there: 1.0 (plain DPO) as the trainer's default, 0.7 in the recipes,
0.5 to 1 in the grid, 0.95 in the released run; β 0.01.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from spo_kernels.arguments import check_in, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.state import RunningState, Stateful
from spo_kernels.losses.terms import log_ratios, logistic


@dataclass(frozen=True)
class DPOShift:
    """`-(1 - ε) log σ(m) - ε log σ(-m)`, `m = β r_w - λβ r_l`, with a fixed λ.

    Agrees with the authors' code; see the module.

    Attributes:
        beta: β > 0; 0.01 in that code.
        shift: 0 < λ <= 1; 0.7 in its recipes, 1 is DPO.
        label_smoothing: 0 <= ε < 0.5.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.01
    shift: float = 0.7
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("shift", self.shift, "(0, 1]")
        check_in("label_smoothing", self.label_smoothing, "[0, 0.5)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        return _shifted(pairs, self.beta, self.shift, self.label_smoothing)


@dataclass(frozen=True)
class DPOShiftLinear(Stateful):
    """`DPOShift` whose λ moves linearly: `λ_k = first + (last - first) min(k / batches, 1)` in the k-th batch, from 0.

    Agrees with the authors' code in the schedule's shape; see the module. Batches are counted as this object is called
    with gradients, so with gradient accumulation they are micro-batches. That count is why it declares "batch".

    Attributes:
        beta: β > 0; 0.01 in that code.
        first, last: 0 < λ <= 1 at both ends, in either order. The defaults are the ends of the authors' grid.
        batches: How many batches > 0 it takes. The default 1000 is this library's.
        label_smoothing: 0 <= ε < 0.5.
        state: The number of batches so far; changed by training, saved by `state_dict`.
    """

    coupling: ClassVar[Coupling] = "batch"
    beta: float = 0.01
    first: float = 1.0
    last: float = 0.5
    batches: float = 1000.0
    label_smoothing: float = 0.0
    state: RunningState = field(
        default_factory=lambda: RunningState(batches=0.0), init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("first", self.first, "(0, 1]")
        check_in("last", self.last, "(0, 1]")
        check_positive("batches", self.batches)
        check_in("label_smoothing", self.label_smoothing, "[0, 0.5)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        done = self.state.get("batches", pairs.chosen)
        shift = self.first + (self.last - self.first) * (done / self.batches).clamp_max(1.0)
        self.state.update(batches=done + 1.0)
        return _shifted(pairs, self.beta, shift, self.label_smoothing)


def _shifted(pairs: PairLogps, beta: float, shift: float | Tensor, label_smoothing: float) -> Tensor:
    chosen, rejected = log_ratios(pairs, "DPOShift")
    return logistic(beta * (chosen - shift * rejected), label_smoothing)
