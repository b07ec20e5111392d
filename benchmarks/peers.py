"""One adapter per peer. Each calls what the peer's installed package offers, and nothing else.

A missing package raises ImportError inside `build`; the row is then printed as skipped, with that text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Problem
from .variant import Skip, Step, Variant, step_from_tokens


def build_torch_lce(problem: Problem) -> Step:
    """torch >= 2.13: `F.linear_cross_entropy`, chunked over tokens, automatic options, no reduction."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Skip(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions()

    def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        nll = F.linear_cross_entropy(flat, weight, labels.flatten(), reduction="none", options=options)
        return -nll.view(labels.shape)

    return step_from_tokens(problem, token_logps)


def trl_builder(tile: tuple[int, int] | None) -> Callable[[Problem], Step]:
    """TRL's chunked log-prob function, without its optional outputs; `tile` = (token rows, vocabulary columns).

    The columns are an argument of the function. The rows are a constant of its module, set for this process.
    """

    def build(problem: Problem) -> Step:
        from trl.kernels import ChunkedLogProbFunction, chunked_logprob
        from trl.trainer import utils

        if tile is None:
            columns = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        else:
            chunked_logprob.TOKEN_CHUNK_SIZE, columns = tile

        def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            flat = hidden.reshape(-1, hidden.shape[-1])
            outputs = ChunkedLogProbFunction.apply(flat, weight, None, labels.flatten(), 1.0, columns, None, 1.0, ())
            return outputs[0].view(labels.shape)

        return step_from_tokens(problem, token_logps)

    return build


def liger_builder(compiled: bool) -> Callable[[Problem], Step]:
    """Liger's chunked DPO loss: no reference model (its reference is then zero), one pair per chunk."""

    def build(problem: Problem) -> Step:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        loss_module = LigerFusedLinearDPOLoss(
            beta=problem.setting.beta, compiled=compiled, use_ref_model=False, average_log_prob=False, chunk_size=1
        )

        def forward() -> tuple[Tensor, tuple[Tensor, ...]]:
            return loss_module(problem.weight, problem.hidden, problem.labels)

        def run() -> Tensor:
            loss, _ = forward()
            loss.backward()
            return loss.detach()

        def sequences() -> Tensor:
            _, (chosen, rejected, *_) = forward()
            return torch.cat([chosen, rejected]).detach()

        return Step(run, sequences=sequences)

    return build


def build_cce(problem: Problem) -> Step:
    """Cut cross-entropy's torch.compile implementation, the one that runs on a CPU."""
    from cut_cross_entropy import linear_cross_entropy

    def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch_compile")

    return step_from_tokens(problem, token_logps)


VARIANTS = [
    Variant("torch-lce", "F.linear_cross_entropy, chunked, none", build_torch_lce),
    Variant("trl", "TRL ChunkedLogProbFunction, default tile", trl_builder(None)),
    Variant("trl-512x4096", "the same, tile 512 x 4096", trl_builder((512, 4096))),
    Variant("liger-dpo", "LigerFusedLinearDPOLoss, eager", liger_builder(compiled=False)),
    Variant("liger-dpo-compiled", "LigerFusedLinearDPOLoss, compiled", liger_builder(compiled=True)),
    Variant("cce", "cut-cross-entropy, impl torch_compile", build_cce),
]
