"""This library: `fused_spo_loss` with DPO, one row per tile backend that the installation knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .inputs import Problem
from .variant import Skip, Step, Variant

PREFIX = "ours-"
EXPECTED_BACKENDS = ("torch", "cpp")


def ours_builder(backend: str) -> Callable[[Problem], Step]:
    def build(problem: Problem) -> Step:
        try:
            from spo_kernels import backend_info, fused_spo_loss, linear_logprob
            from spo_kernels.losses import DPO, PairLogps
        except ImportError as error:
            # Unlike a peer's absence, this is never a reason to skip quietly.
            raise RuntimeError(f"spo_kernels cannot be imported: {error}") from error
        status = backend_info().get(backend)
        if status is None or not status.available:
            raise Skip(f"backend {backend}: {status.detail if status else 'unknown to this version'}")
        dpo = DPO(beta=problem.setting.beta)
        reference = torch.zeros(problem.hidden.shape[0])
        options: dict[str, Any] = {"backend": backend, "workspace_bytes": problem.workspace_bytes}
        tensors = (problem.hidden, problem.weight, problem.labels)

        def run() -> Tensor:
            loss, _ = fused_spo_loss(*tensors, loss=dpo, ref_logps=reference, **options)
            loss.backward()
            return loss.detach()

        @torch.no_grad()
        def tokens() -> Tensor:
            logps = linear_logprob(*tensors, **options)
            assert isinstance(logps, Tensor)
            return logps

        def sequences() -> Tensor:
            seen: list[Tensor] = []

            def recording(pairs: PairLogps) -> Tensor:
                seen.append(torch.cat([pairs.chosen, pairs.rejected]).detach())
                return dpo(pairs)

            fused_spo_loss(*tensors, loss=recording, ref_logps=reference, **options)
            return seen[-1]

        return Step(run, tokens, sequences)

    return build


def our_variants() -> list[Variant]:
    """One variant per backend name; where the package cannot be imported, the rows that say why not."""
    try:
        from spo_kernels import backend_info

        names = tuple(backend_info())
    except Exception:
        names = EXPECTED_BACKENDS
    return [our_variant(name) for name in names]


def our_variant(backend: str) -> Variant:
    return Variant(PREFIX + backend, f"spo_kernels, {backend} backend", ours_builder(backend))
