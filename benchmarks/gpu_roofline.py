"""Bytes that the tile kernels move per logit: on paper, and what they then reach of the copy rate on this device.

`python -m benchmarks.gpu_roofline` prints the paper on any machine, and the measurement where there is a GPU;
`TRITON_INTERPRET=1 python -m benchmarks.gpu_roofline --dry-run` goes through all of it without one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spo_kernels import backend_info
from spo_kernels.backends.contract import LogitTransform, Tile, TokenGrads, TokenStats, mass_blocks
from spo_kernels.backends.registry import load_backend

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
    Traffic(
        "tile_stats + operand",
        READ,
        WRITE,
        "forward of a frozen head or three products, rows of up to 8192 columns in registers",
    ),
    Traffic("tile_stats + operand, wide", 2 * READ, WRITE, "the same, wider rows: the second read mostly from L2"),
    Traffic("tile_grad", READ, WRITE, "backward: dlogits as the operand of dH and dW"),
    Traffic("tile_grad, float32", READ, READ, "backward of float32 inputs, in place"),
    Traffic("scale_rows", WRITE, WRITE, "three products: the factors of a kept bfloat16 tile"),
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


# a bandwidth that a kernel should reach where its tile is this large
TILE = (4096, 32768)
# the driver's own tile, whose rows wait in registers
NARROW_TILE = (4096, 8192)
DRY_TILE = (4, 300)
BACKENDS = ("triton", "cuda")


def measure(device: torch.device, *, dry: bool = False) -> list[dict[str, Any]]:
    """GB/s of every kernel of each backend by its paper bytes, and of a copy of the same tile."""
    clock, repeats = Stopwatch(device), 3 if dry else 20
    rows: list[dict[str, Any]] = []
    for shape in (DRY_TILE,) if dry else (TILE, NARROW_TILE):
        tile = 4 * torch.randn(*shape, device=device)
        target = torch.empty_like(tile)
        copy = _timed("copy_", 2 * READ, shape, lambda tile=tile, target=target: target.copy_(tile), clock, repeats)
        rows.append({"backend": "torch", **copy, "of_copy": 1.0})
        del target
        for backend in BACKENDS:
            status = backend_info()[backend]
            if not status.available:
                rows.append({"backend": backend, "tile": list(shape), "reason": status.detail})
                continue
            for name, size, run in _kernel_runs(backend, tile):
                row = _timed(name, size, shape, run, clock, repeats)
                rows.append({"backend": backend, **row, "of_copy": row["gb_s"] / copy["gb_s"]})
    return rows


def _kernel_runs(backend: str, tile: Tensor) -> list[tuple[str, int, Callable[[], object]]]:
    """Each kernel's name, bytes per logit and a call that leaves the tile as it is."""
    kernels = load_backend(backend)
    (rows, columns), device = tile.shape, tile.device
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    labels = torch.randint(columns, (rows,), device=device)
    rescale, factors = torch.empty(rows, device=device), torch.full((rows,), -1.0, device=device)
    masses = torch.empty(rows, mass_blocks(columns), device=device)
    stats, moments = (TokenStats.start(rows, tile[0], kind) for kind in (False, True))
    grads = TokenGrads(lse_value=tile.logsumexp(1), logp=torch.ones(rows, device=device))
    plain, capped = LogitTransform(), LogitTransform(1.0, 30.0)
    operand = READ + WRITE if columns <= NARROW_TILE[1] else 2 * READ + WRITE

    def statistics(
        transform: LogitTransform, into: TokenStats, out: Tensor | None = None, **extra: Tensor
    ) -> Callable[[], object]:
        given = Tile(tile, labels, transform, out=out)
        return lambda: kernels.tile_stats(given, into, **extra)

    def gradient(transform: LogitTransform) -> Callable[[], object]:
        given = Tile(tile, labels, transform, out=out)
        return lambda: kernels.tile_grad(given, grads)

    return [
        ("tile_stats", READ, statistics(plain, stats)),
        ("tile_stats, softcap", READ, statistics(capped, stats)),
        ("tile_stats, all outputs", READ, statistics(plain, moments)),
        ("tile_stats, masses", READ, statistics(plain, stats, block_lse=masses)),
        ("tile_stats + operand", operand, statistics(plain, stats, out, rescale=rescale)),
        ("tile_grad", READ + WRITE, gradient(plain)),
        ("tile_grad, softcap", READ + WRITE, gradient(capped)),
        ("scale_rows", 2 * WRITE, lambda: kernels.scale_rows(out, factors)),
    ]


def _timed(
    name: str, size: int, shape: tuple[int, int], run: Callable[[], object], clock: Stopwatch, repeats: int
) -> dict[str, Any]:
    for _ in range(3):
        run()
    ms = sorted(clock(run, hide_launch=True) for _ in range(repeats))[repeats // 2]
    rate = size * shape[0] * shape[1] / ms / 1e6
    return {"kernel": name, "tile": list(shape), "bytes_per_logit": size, "ms": ms, "gb_s": rate}


def measured_table(results: list[dict[str, Any]]) -> str:
    """Measured rows, and why others are missing."""
    lines = ["| backend | kernel | tile | bytes per logit | ms | GB/s | of copy |", "|---|---|---|---|---|---|---|"]
    for r in results:
        tile = " x ".join(map(str, r["tile"]))
        if "reason" in r:
            lines.append(f"| {r['backend']} | {r['reason']} | {tile} | | | | |")
            continue
        cells = f"{r['bytes_per_logit']} | {r['ms']:.3f} | {r['gb_s']:.0f} | {r['of_copy']:.0%}"
        lines.append(f"| {r['backend']} | {r['kernel']} | {tile} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_roofline", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="a tiny tile on the CPU, Triton's kernels interpreted")
    dry = parser.parse_args().dry_run
    print(paper())
    if dry or torch.cuda.is_available():
        results = measure(torch.device("cpu" if dry else "cuda"), dry=dry)
        print("\n" + measured_table(results))
        print(json.dumps({"paper": [asdict(row) for row in PAPER], "measured": results}))


if __name__ == "__main__":
    main()
