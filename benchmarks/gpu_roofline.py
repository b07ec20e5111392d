"""Bytes that the tile kernels move per logit: on paper, and what they then reach of the copy rate on this device.

`python -m benchmarks.gpu_roofline` prints the paper on any machine, and the measurement where there is a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from .gpu_measure import Stopwatch

# the products' tile is float32; operands of the next product are bfloat16
READ, WRITE = 4, 2


@dataclass(frozen=True)
class Traffic:
    """One kernel's bytes per logit; per-row values and biases (from L2) are not counted."""

    kernel: str
    read: int
    write: int
    when: str

    @property
    def total(self) -> int:
        return self.read + self.write


PAPER = (
    Traffic("tile_stats", READ, 0, "forward: maximum, sum, label, any output"),
    Traffic("tile_stats + operand", READ, WRITE, "forward of a frozen head, rows of up to 8192 columns in registers"),
    Traffic("tile_stats + operand, wide", 2 * READ, WRITE, "the same, wider rows: the second read mostly from L2"),
    Traffic("tile_grad", READ, WRITE, "backward: dlogits as the operand of dH and dW"),
    Traffic("tile_grad, float32", READ, READ, "backward of float32 inputs, in place"),
)


def paper() -> str:
    """The table on paper, with the time of a pass relative to the product that made the tile."""
    lines = [
        "| kernel | reads | writes | bytes per logit | share of the product's time, H = 1024 / 4096 | when |",
        "|---|---|---|---|---|---|",
    ]
    for row in PAPER:
        # 3.35 TB/s and 700 TFLOP/s, an H100's memory and what its products reach
        shares = [row.total / 3.35e12 / (2 * width / 700e12) for width in (1024, 4096)]
        cells = [row.kernel, f"{row.read} B", f"{row.write} B", f"{row.total}", " / ".join(f"{s:.0%}" for s in shares)]
        lines.append("| " + " | ".join([*cells, row.when]) + " |")
    return "\n".join(lines)


def measure(rows: int = 4096, columns: int = 8192, repeats: int = 20) -> list[dict[str, object]]:
    """GB/s of every kernel by its paper bytes, beside a copy of the same tile."""
    from spo_kernels.tiles import triton_tiles
    from spo_kernels.tiles.spec import LogitTransform, TokenGrads, TokenStats

    device = torch.device("cuda")
    clock = Stopwatch(device)
    tile = 4 * torch.randn(rows, columns, device=device)
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    labels = torch.randint(columns, (rows,), device=device)
    rescale = torch.empty(rows, device=device)
    stats = TokenStats.start(rows, tile[0], False)
    moments = TokenStats.start(rows, tile[0], True)
    grads = TokenGrads(lse_value=tile.logsumexp(1), logp=torch.ones(rows, device=device))
    plain, capped = LogitTransform(), LogitTransform(1.0, 30.0)
    runs: list[tuple[str, int, Callable[[], object]]] = [
        ("copy float32", 8, lambda: tile.clone()),
        ("tile_stats", 4, lambda: triton_tiles.tile_stats(tile, None, labels, plain, stats, None)),
        ("tile_stats, softcap", 4, lambda: triton_tiles.tile_stats(tile, None, labels, capped, stats, None)),
        ("tile_stats, all outputs", 4, lambda: triton_tiles.tile_stats(tile, None, labels, plain, moments, None)),
        ("tile_stats + operand", 6, lambda: triton_tiles.tile_stats(tile, None, labels, plain, stats, rescale, out)),
        ("tile_grad", 6, lambda: triton_tiles.tile_grad(tile, None, labels, plain, grads, out)),
        ("tile_grad, softcap", 6, lambda: triton_tiles.tile_grad(tile, None, labels, capped, grads, out)),
    ]
    results = []
    for name, size, run in runs:
        for _ in range(3):
            run()
        ms = sorted(clock(run, hide_launch=True) for _ in range(repeats))[repeats // 2]
        results.append({"kernel": name, "bytes_per_logit": size, "ms": ms, "gb_s": size * rows * columns / ms / 1e6})
    return results


def measured_table(results: list[dict[str, object]]) -> str:
    lines = ["| kernel, tile 4096 x 8192 | bytes per logit | ms | GB/s |", "|---|---|---|---|"]
    lines += [f"| {r['kernel']} | {r['bytes_per_logit']} | {r['ms']:.3f} | {r['gb_s']:.0f} |" for r in results]
    return "\n".join(lines)


def main() -> None:
    print(paper())
    if torch.cuda.is_available():
        results = measure()
        print("\n" + measured_table(results))
        print(json.dumps({"paper": [asdict(row) for row in PAPER], "measured": results}))


if __name__ == "__main__":
    main()
