"""Stable Preference Optimization (arXiv 2507.07723) as a wrapper around any pairwise objective.

Reconstruction, not verified against the paper: its objective, penalty weight and inner step size were not
available. From its abstract and public reading notes: bilevel, the upper level a preference loss, the lower
level supervised fine-tuning whose optimal-value constraint becomes a penalty,

    min_θ L_pref(θ) + λ [L_SFT(θ) - v],        L_SFT(θ) = -log πθ(y_w|x).

With the value v detached its gradient vanishes, which is the `nll` penalty; `hinge` is active only while the
SFT loss exceeds v by more than ε ("safe region").
"""

from dataclasses import dataclass, field

from torch import Tensor

from spo_kernels.arguments import check_choice, check_not_negative
from spo_kernels.losses.composite import Composite, check_objective
from spo_kernels.losses.dpo import DPO
from spo_kernels.losses.pairs import Coupling, Objective, PairLogps, coupling_of
from spo_kernels.losses.terms import nll

# the per-pair input that holds the hinge's v
SPO_VALUE = "spo_value"


@dataclass(frozen=True)
class SPO(Composite):
    """Reconstruction of SPO, not verified against the paper: `base + weight * NLL_w` ("nll") or
    `base + weight * max(0, NLL_w - v - ε)` ("hinge").

    `NLL_w = -log πθ(y_w|x)` is the sequence's sum, or its mean over response tokens (0 for an empty response).

    Attributes:
        base: Any objective; the SFT penalty is added to its per-pair loss.
        weight: λ >= 0. The default 1.0 is this library's, not the paper's.
        penalty: "nll" or "hinge".
        value: Where the hinge's v comes from: "reference" (the reference's own NLL of the chosen response) or
            "input" (`pair_inputs["spo_value"]`, in the units of `normalization`).
        epsilon: ε >= 0 in nats (per token with "mean").
        normalization: "mean" (per response token) or "sum".
    """

    base: Objective = field(default_factory=DPO)
    weight: float = 1.0
    penalty: str = "nll"
    value: str = "reference"
    epsilon: float = 0.0
    normalization: str = "mean"

    def __post_init__(self) -> None:
        check_objective("base", self.base)
        check_not_negative("weight", self.weight)
        check_choice("penalty", self.penalty, ("nll", "hinge"))
        check_choice("value", self.value, ("reference", "input"))
        check_not_negative("epsilon", self.epsilon)
        check_choice("normalization", self.normalization, ("mean", "sum"))

    def parts(self) -> tuple[Objective, ...]:
        """The base."""
        return (self.base,)

    @property
    def coupling(self) -> Coupling:
        """The penalty adds a term of the chosen response to whatever the base depends on."""
        base = coupling_of(self.base)
        return "pair" if base == "margin" else base

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        penalty = nll(pairs, self.normalization)
        if self.penalty == "hinge":
            penalty = (penalty - self._value(pairs) - self.epsilon).clamp_min(0.0)
        return self.base(pairs) + self.weight * penalty

    def _value(self, pairs: PairLogps) -> Tensor:
        if self.value == "reference":
            return nll(pairs, self.normalization, pairs.reference("SPO with value='reference'")[0])
        return pairs.input(SPO_VALUE, "SPO with value='input'")


def value_normalization(objective: Objective) -> str:
    """In which units the SPO in an objective reads `pair_inputs["spo_value"]`: "mean" per token, or "sum"."""
    if isinstance(objective, SPO) and (objective.penalty, objective.value) == ("hinge", "input"):
        return objective.normalization
    found = (value_normalization(part) for part in (objective.parts() if isinstance(objective, Composite) else ()))
    return "sum" if "sum" in found else "mean"
