"""What the pair-loss kernels compute, and the tensors that they fill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairForm:
    """`-log σ(beta * margin) + weight * penalty`, per pair; the formulas stand in `triton/pair_loss.py`.

    The margin is the policy's difference of sequence log-probs, chosen minus rejected. NLL is the chosen sequence's.
    """

    beta: float
    use_reference: bool = True  # subtract the reference's difference from the margin
    penalty: str = "none"  # "none", "nll": NLL, or "hinge": max(0, NLL - v - epsilon)
    weight: float = 0.0
    epsilon: float = 0.0
    value: str = "reference"  # v of the hinge: the "reference"'s NLL, or an "input" for each pair
    mean: bool = True  # NLL per token, not per sequence


def pair_outputs(logp: Tensor, cu_seqlens: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """The number of pairs B, `summary [7, B]` and coefficients in the shape of `logp`, both to be filled."""
    pairs = (logp.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1) // 2
    # packed tokens that no sequence holds stay 0
    coefficients = torch.empty_like(logp) if cu_seqlens is None else torch.zeros_like(logp)
    return pairs, logp.new_empty((7, pairs)), coefficients


# the numbers of csrc/pair_terms.h
_PENALTIES = {"none": 0, "nll": 1, "hinge": 2}


@dataclass(frozen=True)
class PairCall:
    """A call of an extension's `pair_loss`: its arguments, checked, and the tensors that it fills."""

    arguments: dict[str, Any]
    summary: Tensor
    coefficients: Tensor
    inputs: tuple[Tensor | None, ...]  # alive as long as their addresses are in use

    @classmethod
    def of(
        cls,
        logp: Tensor,
        labels: Tensor,
        form: PairForm,
        *,
        cu_seqlens: Tensor | None,
        reference: Tensor | None,
        value: Tensor | None,
        ignore_index: int,
    ) -> PairCall:
        """See `Backend.pair_loss`.

        Raises:
            ValueError: A tensor has another shape, dtype or device; the message names it.
        """
        logp, labels = logp.contiguous(), labels.contiguous()
        pairs, summary, coefficients = pair_outputs(logp, cu_seqlens)
        bounds, sums, values = (None if x is None else x.contiguous() for x in (cu_seqlens, reference, value))
        _check("logp", logp, logp.shape, (torch.float32,), logp)
        _check("labels", labels, logp.shape, (torch.int64,), logp)
        _check("cu_seqlens", bounds, (2 * pairs + 1,), (torch.int32, torch.int64), logp)
        _check("reference", sums, (2 * pairs,), (torch.float32,), logp)
        _check("value", values, (pairs,), (torch.float32,), logp)
        arguments = {
            "logp": logp.data_ptr(),
            "labels": labels.data_ptr(),
            "bounds": _address(bounds),
            "wide_bounds": bounds is not None and bounds.dtype == torch.int64,
            "pairs": pairs,
            "tokens": logp.numel(),
            "width": logp.shape[-1] if bounds is None else 0,
            "ignore_index": ignore_index,
            "reference": _address(sums),
            "value": _address(values) if form.value == "input" else 0,
            "beta": form.beta,
            "use_reference": form.use_reference,
            "penalty": _PENALTIES[form.penalty],
            "weight": form.weight,
            "epsilon": form.epsilon,
            "mean": form.mean,
            "summary": summary.data_ptr(),
            "coefficients": coefficients.data_ptr(),
        }
        return cls(arguments, summary, coefficients, (logp, labels, bounds, sums, values))


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
