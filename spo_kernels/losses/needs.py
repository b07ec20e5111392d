"""What an objective needs to be given: asked of it, where it does not declare it, by a call on two made-up pairs."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from spo_kernels.losses.pairs import Objective, PairLogps, token_outputs_of


def needs_reference(objective: Objective) -> bool:
    """Whether it refuses to work without the reference's log-probabilities.

    Its attribute `needs_reference` where it has one. Otherwise it is tried, without gradients, so that running
    statistics stay as they are.
    """
    declared = getattr(objective, "needs_reference", None)
    return bool(declared) if declared is not None else not _works(objective, reference=False)


def needs_inputs(objective: Objective) -> tuple[str, ...]:
    """Names of the `pair_inputs` that it reads: its attribute `needs_inputs`, or those that it asks for when tried.

    Sums over tokens, which `fused_spo_loss` finds itself, are not among them; see `Objective`. SGDPO's pilots are; it
    finds them where it evaluates the reference.
    """
    declared = getattr(objective, "needs_inputs", None)
    if declared is not None:
        return tuple(declared)
    asked = _Asked()
    _works(objective, inputs=asked)
    found = {f"{side}_{name}" for side in ("chosen", "rejected") for name in token_outputs_of(objective)}
    return tuple(name for name in asked.names if name not in found)


class _Asked(Mapping[str, Tensor]):
    """Has every name, and remembers those that were asked for."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def __getitem__(self, name: str) -> Tensor:
        self.names[name] = None
        return torch.ones(2)

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _works(objective: Objective, *, reference: bool = True, inputs: Mapping[str, Tensor] | None = None) -> bool:
    ones, lengths = torch.ones(2), torch.ones(2, dtype=torch.int64)
    ref = -ones if reference else None
    pairs = PairLogps(
        chosen=-ones,
        rejected=-2 * ones,
        ref_chosen=ref,
        ref_rejected=ref,
        chosen_lengths=lengths,
        rejected_lengths=lengths,
        inputs=_Asked() if inputs is None else inputs,
    )
    try:
        with torch.no_grad():
            objective(pairs)
    except (ValueError, TypeError):
        return False
    return True
