"""The demo's table as text."""

from __future__ import annotations

from .evaluate import Scores
from .train import SECOND_STAGES, SFT

STAGES = {"sft": SFT, **SECOND_STAGES}

HEADING = f"""\
{"":<14} {"learning":>8}  {"right answers":^17}  {"log p(chosen)":^19}  {"log p(rejected)":^19}  {"":>7} {"chosen":>10}
{"model":<14} {"rate":>8}  {"greedy":>8} {"sampled":>8}  {"solution":>9} {"token":>9}  {"solution":>9} {"token":>9}  \
{"margin":>7} {"preferred":>10}"""

LEGEND = """\
Means over {heldout} held-out problems, log-probs in nats from each model's own logits. Margin: log p(chosen) minus
log p(rejected). Chosen preferred: share of pairs with a positive margin. All below "SFT" start from the SFT model and
take the same number of steps. "SFT on chosen" never sees a rejected solution."""


def label(name: str) -> str:
    return STAGES[name].label if name in STAGES else name


def describe_scores(scores: dict[str, Scores], heldout: int) -> str:
    """One row per model, in the order of training."""
    rows = [HEADING, "-" * len(HEADING.splitlines()[-1])]
    for name, s in scores.items():
        rate = f"{STAGES[name].rate:.0e}" if name in STAGES else "-"
        rows.append(
            f"{label(name):<14} {rate:>8}  {s.right_greedy:>8.1%} {s.right_sampled:>8.1%}  "
            f"{s.chosen:>9.2f} {s.chosen_per_token:>9.3f}  {s.rejected:>9.2f} {s.rejected_per_token:>9.3f}  "
            f"{s.margin:>7.2f} {s.preferred:>10.1%}"
        )
    return "\n".join([*rows, LEGEND.format(heldout=heldout)])
