"""The expression in float64, its gradients, and the smallest error worth complaining about."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spo_kernels.testing.batches import Batch
from spo_kernels.testing.eager import align, cap, eager_logprob, evaluate, random_upstream, scatter, statistics


class Oracle:
    """Float64 values and gradients for a batch, and for each element the error that the inputs' precision excuses.

    `values[name]` and `floors[name]` have the same keys as `evaluate` returns. A floor follows the arithmetic
    that it excuses: a few float32 roundings of a logit (times what a logit can do to the result), and one
    rounding in the inputs' dtype of each addend of a gradient.
    """

    def __init__(
        self,
        batch: Batch,
        upstream: Mapping[str, Tensor],
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        ignore_index: int = -100,
        shift: bool = False,
        outputs: Sequence[str] = (),
    ) -> None:
        labels = batch.labels
        hidden, keep = align(batch.hidden.double(), labels, ignore_index, shift)
        rows, weight = hidden[keep], batch.weight.double()
        products = rows @ weight.T
        size = rows.abs() @ weight.abs().T
        if batch.bias is not None:
            products = products + batch.bias.double()
            size = size + batch.bias.double().abs().nan_to_num(posinf=0.0)
        products.requires_grad_()
        found = statistics(cap(products, logit_scale, logit_softcap), labels.flatten()[keep], outputs)

        # What one rounding of a logit costs: the logit's own size, and how strongly each output follows it.
        log_vocab = math.log(max(len(weight), 1))
        strength = {"logp": 1.0, "lse": 1.0, "entropy": 2.0 + log_vocab, "log_sum_p2": 4.0, "correct": 0.0}
        size = 1 + log_vocab + abs(logit_scale) * size.amax(-1)
        compute_eps = torch.finfo(torch.float64 if batch.hidden.dtype == torch.float64 else torch.float32).eps
        self.values: dict[str, Tensor] = {}
        self.floors: dict[str, Tensor] = {}
        noise = torch.zeros_like(size)
        for name, value in found.items():
            floor = 4 * compute_eps * strength[name] * size
            self.values[name] = scatter(value.detach(), keep, labels.shape)
            self.floors[name] = scatter(floor, keep, labels.shape)
            if name in upstream:
                noise += upstream[name].flatten()[keep].double().abs() * floor * abs(logit_scale)

        wanted = [name for name in found if name in upstream]
        grads = [upstream[name].flatten()[keep].double() for name in wanted]
        (slope,) = torch.autograd.grad([found[name] for name in wanted], products, grads)
        terms = slope.abs()
        input_eps = torch.finfo(batch.hidden.dtype).eps
        tiny = torch.finfo(batch.hidden.dtype).smallest_normal

        def record(name: str, value: Tensor, addends: Tensor, excuse: Tensor) -> None:
            self.values[name] = value
            self.floors[name] = input_eps * addends + excuse + tiny

        def largest(tensor: Tensor) -> Tensor:
            return tensor.abs().max() if tensor.numel() else tensor.new_zeros(())

        def to_rows(value: Tensor) -> Tensor:
            full = scatter(value, keep, batch.hidden.shape)
            return full.roll(-1, dims=-2) if shift else full

        excuse = (noise * largest(weight)).unsqueeze(-1).expand_as(rows)
        record("hidden.grad", to_rows(slope @ weight), to_rows(terms @ weight.abs()), to_rows(excuse))
        record("weight.grad", slope.T @ rows, terms.T @ rows.abs(), noise.sum() * largest(rows))
        if batch.bias is not None:
            record("bias.grad", slope.sum(0), terms.sum(0), noise.sum())


def worst_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; 0 where both hold the same infinity, or `actual` the one that its dtype rounds
    `expected` to; a NaN counts as infinite."""
    error = _error(actual, expected)
    return error.max().item() if error.numel() else 0.0


def _error(actual: Tensor, expected: Tensor) -> Tensor:
    rounded, actual, expected = expected.to(actual.dtype).double(), actual.double(), expected.double()
    right = (actual == expected) | (rounded.isinf() & (actual == rounded))
    error = (actual - expected).abs().masked_fill(right, 0.0)
    return error.nan_to_num(nan=math.inf, posinf=math.inf)


def assert_accurate(
    actual: Mapping[str, Tensor],
    oracle: Oracle,
    eager: Mapping[str, Tensor],
    *,
    factor: float = 2.0,
) -> None:
    """Each element of each result is within `factor` times the worst eager error plus its floor of the oracle."""
    missing = actual.keys() ^ oracle.values.keys()
    assert not missing, f"results and oracle differ in {sorted(missing)}"
    for name, expected in oracle.values.items():
        assert actual[name].shape == expected.shape, f"{name}: {actual[name].shape} != {expected.shape}"
        if name == "correct":
            continue  # a comparison of two rounded logits: tested where the margin is known
        excess = worst_error(eager[name], expected)
        allowed = oracle.floors[name] + factor * (excess if math.isfinite(excess) else 0.0)
        error = _error(actual[name], expected)
        over = error > allowed
        if over.any():
            at = tuple(torch.argwhere(over)[0].tolist())
            raise AssertionError(
                f"{name}[{', '.join(map(str, at))}] = {actual[name][at].item():.9g}, float64 says "
                f"{expected[at].item():.9g}: error {error[at].item():.3g} > {allowed[at].item():.3g} "
                f"(eager's worst {excess:.3g}); {int(over.sum())} of {over.numel()} elements fail"
            )


def check_linear_logprob(
    function: Callable[..., Any],
    batch: Batch,
    *,
    upstream: Mapping[str, Tensor] | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Hold `function`, called as `linear_logprob`, to the oracle: outputs, gradients, dtypes. Returns its results."""
    upstream = upstream or random_upstream(batch, options.get("outputs", ()))
    dtype = torch.float64 if batch.hidden.dtype == torch.float64 else torch.float32
    actual = evaluate(function, batch, upstream, workspace_bytes=workspace_bytes, backend=backend, **options)
    eager = evaluate(eager_logprob, batch, upstream, dtype=dtype, **options)
    assert_accurate(actual, Oracle(batch, upstream, **options), eager)
    for name, value in actual.items():
        expected = batch.hidden.dtype if name.endswith(".grad") else torch.bool if name == "correct" else dtype
        assert value.dtype == expected, f"{name} is {value.dtype}, expected {expected}"
    return actual
