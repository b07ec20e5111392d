"""DPO with a number of each pair added to the logit: ODPO and R-DPO."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spo_kernels.arguments import check_choice, check_not_negative, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import logistic, margin


@dataclass(frozen=True)
class ODPO:
    """`-log σ(βΔ - α δ)`: DPO with an offset, δ = `pair_inputs["offset"]`, which `odpo_offsets` makes from scores.

    Agrees with the authors' code (rycolab/odpo 6152f67c, trainers.py:91-99). Their (β, α): sentiment (0.7, 0.5),
    toxicity (0.05, 1), TL;DR (0.5, 1).

    Attributes:
        beta: β > 0. The default 0.1 is this library's: the authors' go with the task.
        alpha: α >= 0, scale of the offset.
    """

    coupling: ClassVar[Coupling] = "margin"
    beta: float = 0.1
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("alpha", self.alpha)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        return logistic(self.beta * margin(pairs, "ODPO") - self.alpha * pairs.input("offset", "ODPO"))


def odpo_offsets(chosen_scores: Tensor, rejected_scores: Tensor, form: str = "log_difference") -> Tensor:
    """ODPO's δ from the scores R that a reward model or annotators gave.

    "log_difference": `log(R_w - R_l)`; "log_ratio": `log(R_w / R_l)`, both as in the authors' code (rycolab/odpo
    6152f67c, trainers.py:91-99).

    Args:
        chosen_scores, rejected_scores: `[B]` floating point; above 0 for "log_ratio", the chosen response's the
            larger for "log_difference".
        form: Which of the two.

    Returns:
        `[B]` offsets, for `pair_inputs["offset"]`.

    Raises:
        ValueError: Shapes differ, or a logarithm has no value; the message names the pair.
    """
    check_choice("form", form, ("log_difference", "log_ratio"))
    if chosen_scores.shape != rejected_scores.shape or chosen_scores.ndim != 1:
        raise ValueError(
            "chosen_scores and rejected_scores must both be [B], got "
            f"{list(chosen_scores.shape)} and {list(rejected_scores.shape)}"
        )
    if form == "log_difference":
        usable, wanted = chosen_scores > rejected_scores, "above rejected_scores"
    else:
        usable, wanted = (chosen_scores > 0) & (rejected_scores > 0), "and rejected_scores above 0"
    if not bool(usable.all()):
        pair = int((~usable).nonzero()[0])
        raise ValueError(
            f"chosen_scores must be {wanted} for form = {form!r}, got chosen_scores[{pair}] = "
            f"{chosen_scores[pair].item()} and rejected_scores[{pair}] = {rejected_scores[pair].item()}"
        )
    if form == "log_difference":
        return torch.log(chosen_scores - rejected_scores)
    return torch.log(chosen_scores) - torch.log(rejected_scores)


@dataclass(frozen=True)
class RDPO:
    """`-log σ(βΔ + α (n_w - n_l))`: R-DPO (Park et al., arXiv 2403.19159), DPO with a price α on each token.

    The sign follows from the objective, `max E[r(y) - α n(y)] - β KL(π ‖ πref)`. Its optimum is
    `π ∝ πref exp((r - α n) / β)`, so `r = β log(π / πref) + α n + c(x)`, and in `P(w beats l) = σ(r_w - r_l)` the
    lengths enter with plus. A pair whose chosen response is the shorter has the smaller logit, hence the larger
    gradient; one whose chosen response is longer has its length for an explanation and pulls less.

    Agrees with sail-sg/oat c1a074c3 (loss.py:71-72, citing eq. 9), LuJunru/SamPO 25e9631f (dpo_trainer.py:904-906) and
    eq. 2 of Sailor2. The paper's own equation was not read. The form with minus, which α-DPO's baseline has, is not
    R-DPO.

    Attributes:
        beta: β > 0.
        alpha: α >= 0 per token. Notes on the paper report β 0.1 with α 0.1 on HH, and α 0.05 with Phi-2.
    """

    coupling: ClassVar[Coupling] = "margin"
    beta: float = 0.1
    alpha: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("alpha", self.alpha)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        margins = margin(pairs, "RDPO")
        # in the margin's dtype: a float times an int64 tensor is float32
        longer = (pairs.chosen_lengths - pairs.rejected_lengths).to(margins.dtype)
        return logistic(self.beta * margins + self.alpha * longer)
