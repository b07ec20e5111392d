"""What is compared: objectives, their hyperparameters, and the forms of SPO around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A second stage: a base objective as options of `spo-train --loss`, alone or inside SPO."""

    base: str
    form: str  # a key of FORMS, or "" for the objective alone

    @property
    def name(self) -> str:
        return f"{self.base}+{self.form}" if self.form else self.base

    @property
    def options(self) -> list[str]:
        """Of spo-train."""
        hyperparameters = [f for pair in OBJECTIVES[self.base].items() for f in ("--loss-arg", f"{pair[0]}={pair[1]}")]
        if not self.form:
            return ["--loss", self.base, *hyperparameters]
        return ["--loss", "spo", "--base-loss", self.base, *hyperparameters, *FORMS[self.form].split()]


# SFT on the chosen responses of the same pairs: what SPO's penalty does without any preference loss
CONTROL = "sft"

# The methods' authors tuned them for models of billions of parameters. Unset ones are the library's defaults; α-DPO's
# are its authors' for Llama3-Instruct.
OBJECTIVES: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "cpo": {"beta": 0.1},
    "dpop": {"beta": 0.1},
    "r_dpo": {"beta": 0.1, "alpha": 0.05},
    "alpha_dpo": {"beta": 2.5, "gamma": 0.6, "alpha": 0.2},
    CONTROL: {"normalization": "mean"},
}

# SPO's λ = 1 on the mean token NLL, this library's defaults; the paper's are not known.
FORMS = {
    "spo": "--spo-penalty nll",
    "spo-hinge": "--spo-penalty hinge",
    "spo-inner": "--spo-penalty hinge --spo-inner-steps 1 --spo-inner-lr 0.1",
}


def table(objectives: list[str], ablation: bool) -> Iterator[Method]:
    """Each objective alone and with SPO; the control; with `ablation`, DPO with SPO's other forms."""
    for base in (o for o in objectives if o != CONTROL):
        yield Method(base, "")
        yield Method(base, "spo")
        if ablation and base == "dpo":
            yield Method(base, "spo-hinge")
            yield Method(base, "spo-inner")
    yield Method(CONTROL, "")
