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
        own = OBJECTIVES[self.base].split()
        if not self.form:
            return ["--loss", self.base, *own]
        return ["--loss", "spo", "--base-loss", self.base, *own, *FORMS[self.form].split()]


# SFT on the chosen responses of the same pairs: what SPO's penalty does without any preference loss
CONTROL = "sft"

# Each with options of spo-train. Hyperparameters that are not here are the library's defaults, the authors' where they
# are known; they tuned them for models of billions of parameters. α-DPO's are theirs for Llama-3-Instruct, the default
# being those for Gemma-2. SPO goes around every one of them.
OBJECTIVES = {
    "dpo": "",
    "simpo": "",
    "cpo": "",
    "dpop": "",
    "r_dpo": "",
    "alpha_dpo": "--loss-arg beta=2.5 --loss-arg gamma=0.6 --loss-arg alpha=0.2",
    "beta_dpo": "",
    # The tokens of its pilots are drawn anew for every batch.
    "sgdpo": "--reference online",
    CONTROL: "--loss-arg normalization=mean",
}

# SPO's λ = 1 on the mean token NLL, this library's defaults; the paper's are not known.
FORMS = {
    "spo": "--spo-penalty nll",
    "spo-hinge": "--spo-penalty hinge",
    "spo-inner": "--spo-penalty hinge --spo-inner-steps 1 --spo-inner-lr 0.1",
}


def table(objectives: list[str], ablation: bool) -> Iterator[Method]:
    """Each objective alone and with SPO, the control alone; with `ablation`, DPO with SPO's other forms."""
    for base in objectives:
        yield Method(base, "")
        if base != CONTROL:
            yield Method(base, "spo")
        if ablation and base == "dpo":
            yield Method(base, "spo-hinge")
            yield Method(base, "spo-inner")
