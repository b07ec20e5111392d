"""Helpers shared by the tests and the benchmarks.

* `eager_logprob`: the plain PyTorch expression with its logits in a chosen precision.
* `Oracle`: that expression in float64, its gradients, and the smallest error worth complaining about.
* `assert_accurate`: element by element, no worse than twice the eager error plus that floor.
* `random_batch`, `peaked_batch`: inputs.  `TensorMeter`: bytes and matrix products, counted.
"""

from __future__ import annotations

import dataclasses
import math
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spo_kernels.head import LMHead

DIFFERENTIABLE = ("logp", "lse", "entropy", "log_sum_p2")

# Products a metered operator can make; the value is the position of its left operand.
_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "matmul": 0, "linear": 0, "dot": 0, "vdot": 0}
_PRODUCTS |= {"addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1, "addmv": 1, "addmv_": 1}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of `linear_logprob`: hidden [.., H], weight [V, H], labels [..], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None

    def head(self, *, logit_scale: float = 1.0, logit_softcap: float | None = None) -> LMHead:
        """Weight and bias as an `LMHead`."""
        return LMHead(self.weight, self.bias, logit_scale=logit_scale, logit_softcap=logit_softcap)

    def to(self, dtype: torch.dtype) -> Batch:
        """The same batch with hidden, weight and bias in `dtype`."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Batch(self.hidden.to(dtype), self.weight.to(dtype), self.labels, bias)


def random_batch(
    shape: Sequence[int],
    vocab: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    ignored: float = 0.0,
    ignore_index: int = -100,
    spread: float = 1.0,
    seed: int = 0,
) -> Batch:
    """Uniform labels and normal hidden states and weights whose logits have standard deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    scale = math.sqrt(spread / math.sqrt(max(hidden_size, 1)))
    labels = torch.randint(vocab, tuple(shape), generator=generator)
    labels[torch.rand(tuple(shape), generator=generator) < ignored] = ignore_index
    return Batch(
        hidden=(scale * normal(*shape, hidden_size)).to(dtype),
        weight=(scale * normal(vocab, hidden_size)).to(dtype),
        labels=labels,
        bias=normal(vocab).to(dtype) if bias else None,
    )


def peaked_batch(
    sequences: int,
    tokens: int,
    vocab: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    spread: float = 4.0,
    seed: int = 0,
) -> Batch:
    """Logits of standard deviation `spread`, and labels drawn from the softmax itself: what a trained model sees."""
    batch = random_batch((sequences, tokens), vocab, hidden_size, dtype=dtype, spread=spread, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for hidden, labels in zip(batch.hidden, batch.labels, strict=True):
        probs = (hidden.float() @ batch.weight.float().T).softmax(-1)
        labels.copy_(torch.multinomial(probs, 1, generator=generator).squeeze(-1))
    return batch


def _statistics(logits: Tensor, labels: Tensor, outputs: Iterable[str]) -> dict[str, Tensor]:
    """Every output of the primitive from logits [n, V] and labels [n]."""
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    # Where p is 0, p log p is 0 too, and its gradient must not be 0 * -inf.
    safe = log_probs.masked_fill(probs == 0, 0.0)
    target = logits.gather(-1, labels.unsqueeze(-1))
    compute: dict[str, Callable[[], Tensor]] = {
        "logp": lambda: log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "lse": lambda: logits.logsumexp(-1),
        "entropy": lambda: -(probs * safe).sum(-1),
        "log_sum_p2": lambda: (2 * log_probs).logsumexp(-1),
        "correct": lambda: (target >= logits).all(-1),
    }
    return {name: compute[name]() for name in ("logp", *outputs)}


def _cap(products: Tensor, logit_scale: float, logit_softcap: float | None) -> Tensor:
    logits = logit_scale * products
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)


def _align(hidden: Tensor, labels: Tensor, ignore_index: int, shift: bool) -> tuple[Tensor, Tensor]:
    """Flat rows: the hidden state that predicts each label [N, H], and which of them count [N]."""
    keep = labels != ignore_index
    if shift:
        hidden = hidden.roll(1, dims=-2)
        keep = keep & (torch.arange(labels.shape[-1], device=labels.device) > 0)
    return hidden.reshape(labels.numel(), hidden.shape[-1]), keep.flatten()


def _scatter(values: Tensor, keep: Tensor, shape: Sequence[int]) -> Tensor:
    """Values of the kept rows at their places, 0 elsewhere."""
    full = values.new_zeros(keep.shape + values.shape[1:]).index_put((keep,), values)
    return full.reshape(shape)


def eager_logprob(
    hidden: Tensor,
    head: Tensor | LMHead,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    outputs: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """`linear_logprob` as anyone would write it, differentiable, with the `[n, V]` logits in `dtype`."""
    hidden, keep = _align(hidden, labels, ignore_index, shift)
    head = head if isinstance(head, LMHead) else LMHead(head)
    products = hidden[keep].to(dtype) @ head.weight.to(dtype).T
    if head.bias is not None:
        products = products + head.bias.to(dtype)
    found = _statistics(_cap(products, head.logit_scale, head.logit_softcap), labels.flatten()[keep], outputs)
    full = {name: _scatter(value, keep, labels.shape) for name, value in found.items()}
    logp = full.pop("logp")
    return (logp, full) if outputs else logp


def evaluate(
    function: Callable[..., Any],
    batch: Batch,
    upstream: Mapping[str, Tensor],
    *,
    trained: Sequence[str] = ("hidden", "weight", "bias"),
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Run `function` forward and backward: its outputs by name, and `hidden.grad`, `weight.grad`, `bias.grad`.

    `upstream` holds the gradient of each output; an output that it does not name gets none.
    """
    inputs = {"hidden": batch.hidden, "weight": batch.weight, "bias": batch.bias}
    leaves = {
        name: tensor.detach().requires_grad_(name in trained) for name, tensor in inputs.items() if tensor is not None
    }
    head = LMHead(leaves["weight"], leaves.get("bias"), logit_scale=logit_scale, logit_softcap=logit_softcap)
    result = function(leaves["hidden"], head, batch.labels, **options)
    logp, extras = result if isinstance(result, tuple) else (result, {})
    found = {"logp": logp, **extras}
    wanted = [name for name in upstream if name in found]
    torch.autograd.backward([found[name] for name in wanted], [upstream[name] for name in wanted])
    values = {name: value.detach() for name, value in found.items()}
    values |= {f"{name}.grad": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return values


def random_upstream(
    batch: Batch, outputs: Sequence[str] = (), *, size: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """A normal upstream gradient of standard deviation `size` for logp and every differentiable output."""
    generator = torch.Generator().manual_seed(seed + 1)
    dtype = torch.float64 if batch.hidden.dtype == torch.float64 else torch.float32
    names = [name for name in ("logp", *outputs) if name in DIFFERENTIABLE]
    return {name: size * torch.randn(batch.labels.shape, generator=generator).to(dtype) for name in names}


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
        hidden, keep = _align(batch.hidden.double(), labels, ignore_index, shift)
        rows, weight = hidden[keep], batch.weight.double()
        products = rows @ weight.T
        size = rows.abs() @ weight.abs().T
        if batch.bias is not None:
            products = products + batch.bias.double()
            size = size + batch.bias.double().abs().nan_to_num(posinf=0.0)
        products.requires_grad_()
        found = _statistics(_cap(products, logit_scale, logit_softcap), labels.flatten()[keep], outputs)

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
            self.values[name] = _scatter(value.detach(), keep, labels.shape)
            self.floors[name] = _scatter(floor, keep, labels.shape)
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
            full = _scatter(value, keep, batch.hidden.shape)
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


def least_workspace(
    function: Callable[..., Any],
    batch: Batch,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **options: Any,
) -> int:
    """The smallest `workspace_bytes` that `function` accepts for the batch, as its refusal of a single byte states."""
    head = batch.head(logit_scale=logit_scale, logit_softcap=logit_softcap)
    try:
        function(batch.hidden, head, batch.labels, workspace_bytes=1, **options)
    except ValueError as error:
        found = re.search(r"workspace_bytes = 1 is too small.* need (\d+) bytes", str(error))
        if found is None:
            raise
        return int(found[1])
    return 1


class TensorMeter(TorchDispatchMode):
    """Counts what the code under it creates and multiplies, also inside this package's own operators.

    Attributes: `largest` (bytes of the largest tensor created), `live` and `peak` (bytes of the storages created
    and still alive, now and at most), `flops` (of matrix products: 2 per multiply-add).
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._watch(tensor, new=False)
        if func.namespace == "spo_kernels":
            key = getattr(torch._C.DispatchKey, inputs[0].device.type.upper())
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf, new=True)
        position = _PRODUCTS.get(func.overloadpacket.__name__)
        if position is not None:
            self.flops += 2 * result.numel() * args[position].shape[-1]
        return result

    def _watch(self, tensor: Tensor, *, new: bool) -> None:
        if tensor.layout == torch.sparse_coo:
            tensor = tensor._values()
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes() if new else 0
        self._sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
