"""What the pair-loss kernels compute, and the tensors that they fill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# what a kernel writes of every pair, under TRL's names
SUMMARY = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def logps_of(summary: Tensor) -> Tensor:
    """The log-probabilities in a summary `[7, B]`, chosen first: `[2B]`."""
    return summary[SUMMARY.index("logps/chosen") :].flatten()


class PairForm(NamedTuple):
    """`-log σ(beta * margin) + weight * penalty`, per pair; the formulas stand in `triton/pair_loss.py`.

    The margin is the policy's difference of sequence log-probs, chosen minus rejected. NLL is the chosen sequence's.
    """

    beta: float
    use_reference: bool = True  # subtract the reference's difference from the margin
    penalty: str = "none"  # "none", "nll": NLL, or "hinge": max(0, NLL - v - epsilon)
    weight: float = 0.0
    epsilon: float = 0.0
    value_from: str = "reference"  # v of the hinge: the "reference"'s NLL, or an "input" for each pair
    mean: bool = True  # NLL per token, not per sequence


class PairTensors(NamedTuple):
    """What a pair-loss kernel reads of B pairs, and the shapes that follow from it."""

    logp: Tensor  # [2B, T], chosen rows first, or packed [N]; float32
    labels: Tensor  # the same shape, int64; where it is `ignore_index`, a token does not count
    cu_seqlens: Tensor | None  # [2B + 1] bounds of packed sequences, int32 or int64
    reference: Tensor | None  # [2B] float32 sequence sums under the reference
    value: Tensor | None  # [B] float32, v of the hinge where `PairForm.value_from` is "input"
    ignore_index: int

    @property
    def pairs(self) -> int:
        """B."""
        return (self.logp.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1) // 2

    @property
    def width(self) -> int:
        """Tokens of a row; 0 where sequences are packed."""
        return self.logp.shape[-1] if self.cu_seqlens is None else 0

    def contiguous(self) -> PairTensors:
        """The same, each tensor contiguous."""
        tensors: dict[str, Any] = {name: x.contiguous() for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**tensors)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """`summary [7, B]`, see `SUMMARY`, and coefficients in the shape of `logp`, both to be filled."""
        logp = self.logp
        # packed tokens that no sequence holds stay 0
        coefficients = torch.empty_like(logp) if self.cu_seqlens is None else torch.zeros_like(logp)
        return logp.new_empty((len(SUMMARY), self.pairs)), coefficients

    def check(self) -> None:
        """Raise ValueError where a tensor has another shape, dtype or device; the message names it."""
        pairs, floats = self.pairs, (torch.float32,)
        _check("logp", self.logp, self.logp.shape, floats, self.logp)
        _check("labels", self.labels, self.logp.shape, (torch.int64,), self.logp)
        _check("cu_seqlens", self.cu_seqlens, (2 * pairs + 1,), (torch.int32, torch.int64), self.logp)
        _check("reference", self.reference, (2 * pairs,), floats, self.logp)
        _check("value", self.value, (pairs,), floats, self.logp)


# the numbers of csrc/pair_terms.h
_PENALTIES = {"none": 0, "nll": 1, "hinge": 2}


@dataclass(frozen=True)
class PairCall:
    """A call of an extension's `pair_loss`: its arguments, checked, and the tensors that it fills."""

    arguments: dict[str, Any]
    summary: Tensor
    coefficients: Tensor
    pairs: PairTensors  # alive as long as their addresses are in use

    @classmethod
    def of(cls, pairs: PairTensors, form: PairForm) -> PairCall:
        """Of checked tensors; a ValueError names one that is of another shape, dtype or device."""
        pairs = pairs.contiguous()
        pairs.check()
        summary, coefficients = pairs.outputs()
        bounds = pairs.cu_seqlens
        arguments = {
            "logp": pairs.logp.data_ptr(),
            "labels": pairs.labels.data_ptr(),
            "bounds": _address(bounds),
            "wide_bounds": bounds is not None and bounds.dtype == torch.int64,
            "pairs": pairs.pairs,
            "tokens": pairs.logp.numel(),
            "width": pairs.width,
            "ignore_index": pairs.ignore_index,
            "reference": _address(pairs.reference),
            "value": _address(pairs.value) if form.value_from == "input" else 0,
            "beta": form.beta,
            "use_reference": form.use_reference,
            "penalty": _PENALTIES[form.penalty],
            "weight": form.weight,
            "epsilon": form.epsilon,
            "mean": form.mean,
            "summary": summary.data_ptr(),
            "coefficients": coefficients.data_ptr(),
        }
        return cls(arguments, summary, coefficients, pairs)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor
) -> None:
    if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != like.device):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: expected {names} {list(shape)} on {like.device}, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
