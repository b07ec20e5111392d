"""This library: `fused_spo_loss` with DPO, one row per tile backend that the installation knows, and one per way.

A way is a path of the exact gradient, or a sparse backward.

A path's row has the smallest workspace, in round numbers, that the path takes at the default shape; `--workspace-mib`
overrides it. Gradients of half precision cannot be summed in place: their paths need a [V, H] accumulator more, or
one group of pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .inputs import Problem
from .settings import Setting
from .variant import Skip, Step, Variant

PREFIX = "ours-"
EXPECTED_BACKENDS = ("torch", "cpp")
# MiB of workspace: float32, half precision
PATH_WORKSPACE = {"packed": (160, 160), "factorised": (64, 192), "two_pass": (32, 32)}
# mode and log2 of the tolerance
SPARSE = {"certified8": ("certified", -8), "certified10": ("certified", -10), "unbiased10": ("unbiased", -10)}


def ours_builder(backend: str, way: str | None) -> Callable[[Problem], Step]:
    path = way if way in PATH_WORKSPACE else None

    def build(problem: Problem) -> Step:
        try:
            from spo_kernels import Sparsity, backend_info, fused_spo_loss, linear_logprob
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
        if path is not None and problem.workspace_bytes is None:
            options["workspace_bytes"] = PATH_WORKSPACE[path][problem.setting.dtype != "float32"] << 20
        choice: dict[str, Any] = {"path": path}
        if way in SPARSE:
            mode, exponent = SPARSE[way]
            choice["sparsity"] = Sparsity(mode, 2.0**exponent)
        tensors = (problem.hidden, problem.weight, problem.labels)

        def loss_of(objective: DPO) -> Tensor:
            try:
                return fused_spo_loss(*tensors, loss=objective, ref_logps=reference, **choice, **options)[0]
            except ValueError as error:
                if path is not None and str(error).startswith("path ="):
                    raise Skip(str(error)) from error
                raise

        def run() -> Tensor:
            loss = loss_of(dpo)
            loss.backward()
            return loss.detach()

        @torch.no_grad()
        def tokens() -> Tensor:
            logps = linear_logprob(*tensors, **options)
            assert isinstance(logps, Tensor)
            return logps

        def sequences() -> Tensor:
            seen: list[Tensor] = []

            class Recording(DPO):
                def __call__(self, pairs: PairLogps) -> Tensor:
                    seen.append(torch.stack([pairs.chosen, pairs.rejected]).detach())
                    return super().__call__(pairs)

            loss_of(Recording(beta=problem.setting.beta))
            return torch.cat(seen, dim=1).flatten()

        return Step(run, tokens, sequences)

    return build


def our_variants(setting: Setting) -> list[Variant]:
    """One variant per backend name, per path of a trained head, and per sparse backward where logits are not random.

    Without the package, the rows that say why not.
    """
    try:
        from spo_kernels import backend_info

        names = tuple(backend_info())
    except Exception:
        names = EXPECTED_BACKENDS
    paths = [] if setting.frozen else list(PATH_WORKSPACE)
    sparse = [] if setting.logits == "random" else list(SPARSE)
    return [our_variant(name) for name in (*names, *(f"cpp-{way}" for way in (*paths, *sparse)))]


def our_variant(name: str) -> Variant:
    """The variant of a backend's name, or of `backend-way`."""
    backend, _, way = name.partition("-")
    about = f"spo_kernels, {backend} backend" + (f", path {way}" if way in PATH_WORKSPACE else "")
    if way in SPARSE:
        mode, exponent = SPARSE[way]
        about += f", {mode} sparse backward, tolerance 2^{exponent}"
    return Variant(PREFIX + name, about, ours_builder(backend, way or None))
