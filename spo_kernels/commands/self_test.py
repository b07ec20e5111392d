"""A few seconds of `linear_logprob` beside plain torch and float64: is it right here, and how fast?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends.registry import choose_backend
from spo_kernels.logprob import linear_logprob
from spo_kernels.testing import Batch, eager_logprob, peaked_batch

# small: torch's bfloat16 gradients take 2 s of a core without AVX-512 even so
TOKENS, HIDDEN, VOCAB = 512, 128, 8192
# of a sum of 512 log-probabilities against float64, in nats: the contract of docs/accuracy.md
LARGEST_SUM_ERROR = 0.01
# of a gradient against float64, relative: some roundings in the inputs' dtype
LARGEST_GRADIENT_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
# after which a side is not called again
SECONDS = 0.5


@dataclass(frozen=True)
class Found:
    """What came out for one device and dtype."""

    device: str
    dtype: torch.dtype
    backend: str
    token_error: float  # nats
    sum_error: float  # nats, of 512 tokens
    torch_sum_error: float  # the same with torch's logits in the inputs' dtype
    gradient_error: float  # of hidden states and weight, the larger
    milliseconds: float
    torch_milliseconds: float

    @property
    def accurate(self) -> bool:
        """Whether it keeps the contract; a NaN does not."""
        return self.sum_error <= LARGEST_SUM_ERROR and self.gradient_error <= LARGEST_GRADIENT_ERROR[self.dtype]


def self_test(device: str, dtype: torch.dtype) -> Found:
    """Values, gradients and time of one call with a trained head.

    Raises:
        RuntimeError, ValueError: The environment asks for what cannot be used here.
    """
    backend = choose_backend(None, torch.device(device), dtype)
    batch = peaked_batch(1, TOKENS, VOCAB, HIDDEN, dtype=dtype)
    batch = Batch(batch.hidden.to(device), batch.weight.to(device), batch.labels.to(device))
    truth = _run(lambda h, w, y: eager_logprob(h, w, y, dtype=torch.float64), _in_float64(batch))
    ours, plain = _fastest(linear_logprob, batch), _fastest(_plain, batch)
    off = ours.logp.double() - truth.logp
    grads = zip(ours.grads, truth.grads, strict=True)
    return Found(
        device,
        dtype,
        backend,
        token_error=off.abs().max().item(),
        sum_error=off.sum().abs().item(),
        torch_sum_error=(plain.logp.double() - truth.logp).sum().abs().item(),
        gradient_error=max(((grad.double() - true).norm() / true.norm()).item() for grad, true in grads),
        milliseconds=1e3 * ours.seconds,
        torch_milliseconds=1e3 * plain.seconds,
    )


@dataclass(frozen=True)
class _Call:
    """A forward and backward: log-probabilities, gradients of their negative sum, and how long it took."""

    logp: Tensor
    grads: tuple[Tensor, ...]
    seconds: float


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As training code has it: logits in the inputs' dtype."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def _in_float64(batch: Batch) -> Batch:
    return Batch(batch.hidden.double(), batch.weight.double(), batch.labels)


def _run(function: Callable[..., Any], batch: Batch) -> _Call:
    hidden, weight = batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()
    start = time.perf_counter()
    logp = function(hidden, weight, batch.labels)
    grads = torch.autograd.grad(-logp.sum(), (hidden, weight))
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return _Call(logp.detach(), grads, time.perf_counter() - start)


def _fastest(function: Callable[..., Any], batch: Batch) -> _Call:
    """The fastest of some calls."""
    calls: list[_Call] = []
    while sum(call.seconds for call in calls) < SECONDS:
        calls.append(_run(function, batch))
    return min(calls, key=lambda call: call.seconds)
