"""What ops take and return, in groups: a schema has tensors and plain numbers in a row, Python has their meaning."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from spo_kernels.sparsity import Sparsity


class ModelTensors(NamedTuple):
    """Hidden states and a head; see `ModelInputs.tensors`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: Tensor  # scale and softcap, float64 [2] on the CPU
    base: Tensor | None


class CallOptions(NamedTuple):
    """How an op is to be computed."""

    shift: bool
    workspace_bytes: int | None
    backend: str


class Asked(NamedTuple):
    """What a forward is to find beside log-probabilities."""

    moments: bool  # entropy and log Σ p²
    mean: bool  # the mean logit
    need_logp_grad: bool
    sparsity: str
    tolerance: float
    seed: int

    @property
    def choice(self) -> Sparsity:
        """What a sparse backward may leave out."""
        return Sparsity(self.sparsity, self.tolerance, self.seed)


class ForLabels(NamedTuple):
    """What a forward returns for each label; empty where it was not asked for."""

    logp: Tensor
    lse: Tensor
    correct: Tensor
    entropy: Tensor
    log_sum_p2: Tensor
    dropped_mass: Tensor
    kept_share: Tensor
    mean_logit: Tensor


class ForBackward(NamedTuple):
    """What it returns for the backward alone."""

    logp_grad: Tensor  # d logp / d hidden, if it was finished
    lse_rest: Tensor  # see `TokenGrads`
    codes: Tensor  # see `KeptBlocks`
    code_counts: Tensor  # [blocks] int64 on the CPU: tokens of each
    sparse: Tensor  # 0-d bool on the CPU: whether the backward is sparse, and codes are filled


class Statistics(NamedTuple):
    """What a backward reads of `ForLabels`."""

    lse: Tensor
    entropy: Tensor
    log_sum_p2: Tensor


class Upstream(NamedTuple):
    """Gradients that flow into a forward's outputs."""

    grad_logp: Tensor | None
    grad_lse: Tensor | None
    grad_entropy: Tensor | None
    grad_log_sum_p2: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    need_hidden: bool
    need_weight: bool
    need_bias: bool


class Gradients(NamedTuple):
    """What a backward returns; empty where it was not wanted."""

    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


_IN_SCHEMAS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    int | None: "int?",
    float: "float",
    str: "str",
}


def schema(*groups: type[tuple[Any, ...]], prefix: str = "") -> str:
    """The groups as a schema lists them, names with a prefix."""
    hints = (hint for group in groups for hint in get_type_hints(group).items())
    return ", ".join(f"{_IN_SCHEMAS[kind]} {prefix}{name}" for name, kind in hints)


def split(arguments: Iterable[Any], *groups: type[tuple[Any, ...]]) -> list[Any]:
    """What stands in a row, in its groups."""
    left = iter(arguments)
    return [group(*islice(left, len(group._fields))) for group in groups]  # type: ignore[attr-defined]
