"""This library: `fused_spo_loss` with DPO, one row per tile backend that the installation knows, and one per way.

A way is a path of the exact gradient, or a sparse backward.

A path's row has the smallest workspace, in round numbers, that the path takes at the default shape; `--workspace-mib`
overrides it. Gradients of half precision cannot be summed in place: their paths need a [V, H] accumulator more, or
one group of pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True)
class Ours:
    """`fused_spo_loss` with DPO on one problem."""

    problem: Problem
    reference: Tensor
    options: dict[str, Any]  # of every call
    choice: dict[str, Any]  # of the loss alone: path and sparsity

    @classmethod
    def of(
        cls,
        problem: Problem,
        backend: str,
        *,
        path: str | None = None,
        sparse: tuple[str, int] | None = None,
        workspace_bytes: int | None = None,
    ) -> Ours:
        """On a backend; `sparse` is mode and log2 of the tolerance, `workspace_bytes` overrides the problem's.

        Raises:
            Skip: The backend is missing; says why.
        """
        try:
            from spo_kernels import Sparsity, backend_info
        except ImportError as error:
            # Unlike a peer's absence, this is never a reason to skip quietly.
            raise RuntimeError(f"spo_kernels cannot be imported: {error}") from error
        status = backend_info().get(backend)
        if status is None or not status.available:
            raise Skip(f"backend {backend}: {status.detail if status else 'unknown to this version'}")
        reference = torch.zeros(problem.hidden.shape[0], device=problem.hidden.device)
        options = {"backend": backend, "workspace_bytes": workspace_bytes or problem.workspace_bytes}
        choice: dict[str, Any] = {"path": path}
        if sparse:
            choice["sparsity"] = Sparsity(sparse[0], 2.0 ** sparse[1])
        return cls(problem, reference, options, choice)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, head and labels."""
        return self.problem.hidden, self.problem.weight, self.problem.labels

    def loss(self, objective: Any = None) -> Tensor:
        """Of DPO, or of another objective."""
        from spo_kernels import fused_spo_loss
        from spo_kernels.losses import DPO

        objective = objective or DPO(beta=self.problem.setting.beta)
        try:
            return fused_spo_loss(
                *self.tensors, loss=objective, ref_logps=self.reference, **self.choice, **self.options
            )[0]
        except ValueError as error:
            if str(error).startswith("path ="):
                raise Skip(str(error)) from error
            raise

    def run(self) -> Tensor:
        """Forward and backward."""
        loss = self.loss()
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def tokens(self) -> Tensor:
        """Log-probabilities of the tokens."""
        from spo_kernels import linear_logprob

        logps = linear_logprob(*self.tensors, **self.options)
        assert isinstance(logps, Tensor)
        return logps

    def sequences(self) -> Tensor:
        """Log-probabilities of the responses, as the objective sees them."""
        from spo_kernels.losses import DPO, PairLogps

        seen: list[Tensor] = []

        class Recording(DPO):
            def __call__(self, pairs: PairLogps) -> Tensor:
                seen.append(torch.stack([pairs.chosen, pairs.rejected]).detach())
                return super().__call__(pairs)

        self.loss(Recording(beta=self.problem.setting.beta))
        return torch.cat(seen, dim=1).flatten()

    def step(self) -> Step:
        """To be timed."""
        return Step(self.run, self.tokens, self.sequences)


def build_ours(backend: str, way: str | None, problem: Problem) -> Step:
    """On a CPU; a path has its own workspace where the problem has none."""
    if way not in PATH_WORKSPACE:
        return Ours.of(problem, backend, sparse=SPARSE.get(way or "")).step()
    workspace = problem.workspace_bytes or PATH_WORKSPACE[way][problem.setting.dtype != "float32"] << 20
    return Ours.of(problem, backend, path=way, workspace_bytes=workspace).step()


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
    return Variant(PREFIX + name, about, partial(build_ours, backend, way or None))
