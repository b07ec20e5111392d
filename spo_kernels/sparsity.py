"""What a sparse backward may leave out."""

from dataclasses import dataclass, replace

import torch

from spo_kernels.arguments import check_choice, check_in, check_whole

MODES = ("exact", "certified", "unbiased")


@dataclass(frozen=True)
class Sparsity:
    """Which blocks of the vocabulary the backward multiplies, token by token. Forward values never change.

    With p the softmax, a token's gradient is `c Σ_v (onehot_v - p_v) d logit_v`, c the upstream gradient of its
    log-probability. The onehot term, and the block of columns that holds the label, are exact in every mode.

    - "exact": everything.
    - "certified": for each token the blocks with the least mass `Σ_{v in block} p_v` are left out as long as their
      masses together stay under `tolerance`. So the gradient by its logits is off by at most `|c| * tolerance` in L1,
      and the one by its hidden state by at most that times the largest norm of a row of the weight. (The same
      columns are left out where entropy or log Σ p² carry gradients; no bound is stated for those.)
    - "unbiased": a block is kept with probability at least `min(1, mass / tolerance)` and divided by it. The gradient's
      expectation is the exact gradient, and the expected squared error by a token's logits (L2) is at most
      `c² * tolerance * (mass of its blocks below tolerance)`.

    Where too much would be kept for this to pay, the exact backward runs instead; see `kept_share` and
    `dropped_mass` among the outputs of `linear_logprob`, and the metrics of `fused_spo_loss`.

    Attributes:
        mode: "exact", "certified" or "unbiased".
        tolerance: τ in (0, 1), a probability mass per token.
        seed: Of the choice in "unbiased"; the same seed makes the same choice. Change it from step to step.
    """

    mode: str = "certified"
    tolerance: float = 2.0**-8
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("sparsity mode", self.mode, MODES)
        check_in("sparsity tolerance", self.tolerance, "(0, 1)")
        check_whole("sparsity seed", self.seed, 0)


EXACT = Sparsity("exact")


def of_next_batch(sparsity: Sparsity, training: bool) -> Sparsity:
    """What a training loop uses for its next batch: "unbiased" with a new seed, and nothing but EXACT in evaluation.

    The seed comes from torch's default generator, whose state checkpoints keep.
    """
    if not training:
        return EXACT
    return replace(sparsity, seed=int(torch.randint(2**62, ()))) if sparsity.mode == "unbiased" else sparsity


def as_sparsity(value: str | Sparsity) -> Sparsity:
    """The `sparsity=` argument of the public functions: a mode with its defaults, or a `Sparsity`.

    Raises:
        TypeError, ValueError: It is neither.
    """
    if isinstance(value, Sparsity):
        return value
    if not isinstance(value, str):
        raise TypeError(f"sparsity must be one of {', '.join(map(repr, MODES))} or a Sparsity, got {value!r}")
    return Sparsity(value)
