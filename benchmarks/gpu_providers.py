"""What is compared on a GPU. Peers come from `peers`, by what their installed packages offer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import naive, peers
from .inputs import Problem
from .ours import SPARSE, Ours, build_ours
from .variant import Skip, Step, Variant, step_from_tokens

OURS = "ours-"


class BareProducts:
    """Vendor products of one problem, in its dtype, into one reused tile and preallocated gradients."""

    def __init__(self, problem: Problem, tile: tuple[int, int], gradients: bool = True) -> None:
        self.hidden = problem.hidden.detach().flatten(0, 1)
        self.weight = problem.weight.detach()
        n, vocab = self.hidden.shape[0], self.weight.shape[0]
        self.rows, self.columns = (min(size or full, full) for size, full in zip(tile, (n, vocab), strict=True))
        self.tile = torch.empty(self.rows * self.columns, dtype=self.weight.dtype, device=self.weight.device)
        # its values must be like a gradient's: zeros would cost less power and run faster
        self.tile.normal_(std=1e-3)
        self.dh = torch.empty_like(self.hidden) if gradients else None
        self.dw = torch.empty_like(self.weight) if gradients else None

    def run(self, kinds: str) -> None:
        """`kinds`: any of l (logits), h (dH), w (dW), in turn."""
        n, vocab = self.hidden.shape[0], self.weight.shape[0]
        for kind in kinds:
            for row in range(0, n, self.rows):
                for col in range(0, vocab, self.columns):
                    self._one(kind, slice(row, min(row + self.rows, n)), slice(col, min(col + self.columns, vocab)))

    def _one(self, kind: str, rows: slice, cols: slice) -> None:
        shape = (rows.stop - rows.start, cols.stop - cols.start)
        tile = self.tile[: shape[0] * shape[1]].view(shape)
        if kind == "l":
            torch.mm(self.hidden[rows], self.weight[cols].t(), out=tile)
            return
        out = self.dh[rows] if kind == "h" else self.dw[cols]
        a, b = (tile, self.weight[cols]) if kind == "h" else (tile.t(), self.hidden[rows])
        first = (cols if kind == "h" else rows).start == 0
        torch.addmm(out, a, b, beta=0 if first else 1, out=out)


FLOOR_KINDS = {1: "l", 2: "lh", 3: "lhw", 4: "llhw"}


def build_graph(problem: Problem) -> Step:
    """Triton's forward and backward, replayed as one CUDA graph."""
    ours = Ours.of(problem, "triton")
    if not problem.hidden.is_cuda:
        raise Skip("a CUDA graph needs CUDA")
    return Step(captured(ours.run, problem))


def build_sparse(sparse: tuple[str, int], problem: Problem) -> Step:
    """Triton with a sparse backward."""
    if problem.setting.logits == "random":
        raise Skip("nearly all of the vocabulary has mass")
    return Ours.of(problem, "triton", sparse=sparse).step()


def build_two_pass(problem: Problem) -> Step:
    """Triton on the way that takes any loss."""
    return Ours.of(problem, "triton", path="two_pass").step()


def captured(run: Callable[[], Tensor], problem: Problem) -> Callable[[], Tensor]:
    """A replay of `run`; gradients land in the graph's own buffers."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            problem.clear()
            run()
    torch.cuda.current_stream().wait_stream(side)
    problem.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run()
    gradients = problem.hidden.grad, problem.weight.grad

    # `run` holds what the graph reads: freed, its memory would be others'
    def replay(inputs: Callable[[], Tensor] = run) -> Tensor:
        graph.replay()
        problem.hidden.grad, problem.weight.grad = gradients
        return loss

    return replay


def build_liger_scaled_ce(problem: Problem) -> Step:
    """Liger's per-token loss: its own kernels on Hopper and Blackwell, 512-token chunks elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden.flatten(0, 1), weight, labels.flatten())
        nll = found[0] if isinstance(found, tuple) else found
        return -nll.view(labels.shape)

    return step_from_tokens(problem, token_logps)


def build_cce(problem: Problem) -> Step:
    """Cut cross-entropy's Triton kernels, with gradient filtering as it comes."""
    from cut_cross_entropy import linear_cross_entropy

    def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="cce")

    return step_from_tokens(problem, token_logps)


def build_failing(problem: Problem) -> Step:
    """Dies without a word, as a kernel that corrupts its context does: the others must still run."""
    raise SystemExit(11)


def all_providers(dry: bool) -> dict[str, Variant]:
    """By name, in the order of the tables."""
    ours = [Variant(OURS + name, f"spo_kernels, {name}", partial(build_ours, name, None)) for name in our_backends()]
    two = Variant(OURS + "triton-two-pass", "the same, path two_pass", build_two_pass)
    graph = Variant(OURS + "triton-graph", "spo_kernels, triton, as a CUDA graph", build_graph)
    sparse = [
        Variant(
            f"{OURS}triton-{way}",
            f"the same, {mode} sparse backward, tolerance 2^{exponent}",
            partial(build_sparse, (mode, exponent)),
        )
        for way, (mode, exponent) in SPARSE.items()
    ]
    from_peers = {variant.name: variant for variant in peers.VARIANTS}
    wanted = [from_peers[n] for n in ("trl", "liger-dpo", "liger-dpo-compiled", "torch-lce") if n in from_peers]
    listed = [
        *[variant for variant in naive.VARIANTS if variant.name in ("naive", "naive-compiled")],
        *wanted,
        Variant("liger-scaled-ce", "Liger fused linear scaled CE", build_liger_scaled_ce),
        Variant("cce", "cut-cross-entropy, impl cce", build_cce),
        *ours,
        two,
        *sparse,
        graph,
    ]
    if dry:
        listed.append(Variant("dies", "a provider whose process dies", build_failing))
    return {variant.name: variant for variant in listed}


def our_backends() -> list[str]:
    """Every backend that a GPU could use, there or not: a missing one says why in its row."""
    from spo_kernels import backend_info

    return [name for name in backend_info() if name != "cpp"]
