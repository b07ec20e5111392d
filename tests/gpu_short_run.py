"""Every kernel of one backend once or twice on small ragged inputs: what compute-sanitizer watches.

`python tests/gpu_short_run.py [triton|cuda] [loss|tiles|pairs]`: through the public functions, or the kernels of tiles
or pairs alone.
"""

import sys

import torch

from spo_kernels import LMHead, fused_spo_loss, linear_logprob
from spo_kernels.backends.contract import LogitTransform, Tile, TokenGrads, TokenStats, mass_blocks
from spo_kernels.backends.pair_form import PairTensors
from spo_kernels.backends.registry import load_backend
from spo_kernels.losses import DPO, SPO
from spo_kernels.preference.kernel import kernel_form


def run_loss(backend: str, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(4, 7, 24, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(1031, 24, device=device, dtype=dtype, requires_grad=True)
        bias = torch.randn(1031, device=device, dtype=dtype, requires_grad=True)
        labels = torch.randint(1031, (4, 7), device=device)
        labels[0, 3] = -100
        outputs = ("entropy", "log_sum_p2")
        for workspace in (None, 20_000):
            head = LMHead(weight, bias)
            logp, extras = linear_logprob(
                hidden, head, labels, outputs=outputs, workspace_bytes=workspace, backend=backend
            )
            (logp.sum() + extras["entropy"].sum() + extras["log_sum_p2"].sum()).backward()
            frozen = LMHead(weight.detach(), logit_softcap=9.0)
            linear_logprob(hidden, frozen, labels, backend=backend).sum().backward()
        reference = torch.zeros(4, device=device)
        for loss in (DPO(), SPO(penalty="hinge")):
            for path in ("two_pass", "packed", "factorised"):
                value, _ = fused_spo_loss(
                    hidden, weight, labels, loss=loss, ref_logps=reference, path=path, backend=backend
                )
                value.backward()
        assert all(tensor.grad.isfinite().all() for tensor in (hidden, weight, bias))


def run_tiles(backend: str, device: str) -> None:
    tiles = load_backend(backend)
    transform = LogitTransform(0.7, 30.0)
    rows = 5
    for columns in (1, 33, 512, 1031, 8192, 8197):
        products = torch.randn(rows, columns, device=device)
        bias, factors = torch.randn(columns, device=device), torch.rand(rows, device=device)
        labels = torch.arange(rows, device=device) * columns // 3
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = torch.zeros(rows, columns, dtype=dtype, device=device)
            stats = TokenStats.start(rows, products, True)
            masses = torch.zeros(rows, mass_blocks(columns), device=device)
            tiles.tile_stats(Tile(products, labels, transform, bias), stats, block_lse=masses)
            given = Tile(products.clone(), labels, transform, bias, out)
            tiles.tile_stats(given, stats, rescale=factors.clone())
            lse = stats.max + stats.sum.log()
            flows = dict.fromkeys(
                ("logp", "lse", "entropy", "entropy_value", "log_sum_p2", "log_sum_p2_value"), factors
            )
            tiles.tile_grad(Tile(products.clone(), labels, transform, bias, out), TokenGrads(lse, **flows))
        tiles.scale_rows(products, factors)
        assert products.isfinite().all() and out.isfinite().all()


def run_pairs(backend: str, device: str) -> None:
    logp = torch.randn(6, 700, device=device)
    labels = torch.randint(1031, logp.shape, device=device)
    labels[0, 3], labels[1] = -100, -100
    reference = torch.zeros(6, device=device)
    bounds = torch.tensor([0, 5, 5, 700, 1400, 2800, 4200], device=device)
    for objective in (DPO(), SPO(penalty="hinge")):
        form = kernel_form(objective, True, False)
        assert form is not None
        for values, classes, cu_seqlens in ((logp, labels, None), (logp.flatten(), labels.flatten(), bounds)):
            pairs = PairTensors(values, classes, cu_seqlens, reference, None, -100)
            summary, slopes = load_backend(backend).pair_loss(pairs, form, 1.0)
            assert summary.isfinite().all() and slopes.isfinite().all()


def main(backend: str = "triton", what: str = "loss") -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    {"loss": run_loss, "tiles": run_tiles, "pairs": run_pairs}[what](backend, device)
    print("ran on", device)


if __name__ == "__main__":
    main(*sys.argv[1:])
