"""The floor: the bare matrix products, into preallocated outputs, each by the fastest tiling found in this run.

logits: hidden @ weight.T      dH: dlogits @ weight      dW: dlogits.T @ hidden
One tile of logits is reused throughout, so a small tile stays in cache: nothing that computes the same products
through the same library has less to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .inputs import Problem
from .settings import Setting
from .variant import Step, Variant

KINDS = ("logits", "dH", "dW")
# (token rows, vocabulary columns) of a tile; 0: all of them.
TILES = ((0, 0), (0, 1024), (0, 2048), (0, 4096), (0, 8192), (512, 0), (512, 4096), (1024, 4096))
# What 2, 3 and 4 products are: a frozen head; logits kept or scaled later; logits recomputed in the backward.
PRODUCTS = {2: ("logits", "dH"), 3: ("logits", "dH", "dW"), 4: ("logits", "logits", "dH", "dW")}

Layout = tuple[int, int]


class Products:
    """The three products on one problem, each into preallocated outputs."""

    def __init__(self, problem: Problem, layouts: dict[str, Layout], kinds: tuple[str, ...]) -> None:
        self.hidden = problem.hidden.detach().flatten(0, 1)
        self.weight = problem.weight.detach()
        tiles = {kind: self.tile(layouts[kind]) for kind in kinds}
        shared = {tile: torch.empty(tile, dtype=self.weight.dtype).normal_() for tile in set(tiles.values())}
        self.buffers = {kind: shared[tile] for kind, tile in tiles.items()}
        self.dh = torch.empty_like(self.hidden) if "dH" in kinds else None
        self.dw = torch.empty_like(self.weight) if "dW" in kinds else None

    def tile(self, layout: Layout) -> Layout:
        rows, cols = self.hidden.shape[0], self.weight.shape[0]
        return (min(layout[0] or rows, rows), min(layout[1] or cols, cols))

    def run(self, kind: str) -> None:
        {"logits": self.logits, "dH": self.grad_hidden, "dW": self.grad_weight}[kind]()

    def logits(self) -> None:
        tile = self.buffers["logits"]
        for rows in spans(self.hidden.shape[0], tile.shape[0]):
            for cols in spans(self.weight.shape[0], tile.shape[1]):
                torch.mm(self.hidden[rows], self.weight[cols].t(), out=cut(tile, rows, cols))

    def grad_hidden(self) -> None:
        tile = self.buffers["dH"]
        assert self.dh is not None
        for rows in spans(self.hidden.shape[0], tile.shape[0]):
            for cols in spans(self.weight.shape[0], tile.shape[1]):
                accumulate(self.dh[rows], cut(tile, rows, cols), self.weight[cols], first=cols.start == 0)

    def grad_weight(self) -> None:
        tile = self.buffers["dW"]
        assert self.dw is not None
        for cols in spans(self.weight.shape[0], tile.shape[1]):
            for rows in spans(self.hidden.shape[0], tile.shape[0]):
                accumulate(self.dw[cols], cut(tile, rows, cols).t(), self.hidden[rows], first=rows.start == 0)


def spans(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def cut(tile: Tensor, rows: slice, cols: slice) -> Tensor:
    return tile[: rows.stop - rows.start, : cols.stop - cols.start]


def accumulate(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    if first:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(out, a, b, out=out)


def candidates(setting: Setting) -> list[Layout]:
    """The tilings that differ at this shape."""
    seen: dict[Layout, Layout] = {}
    for rows, cols in TILES:
        actual = (min(rows or setting.rows, setting.rows), min(cols or setting.vocab, setting.vocab))
        seen.setdefault(actual, (rows, cols))
    return list(seen.values())


def kinds_needed(setting: Setting) -> tuple[str, ...]:
    return KINDS[:2] if setting.frozen else KINDS


def calibrate(problem: Problem, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Best milliseconds of every tiling of every product: {kind: {"rows x cols": ms}}."""
    times: dict[str, dict[str, float]] = {}
    for kind in kinds_needed(problem.setting):
        times[kind] = {}
        for layout in candidates(problem.setting):
            products = Products(problem, {kind: layout}, (kind,))
            products.run(kind)
            times[kind][name_of(layout)] = min(milliseconds(products, kind) for _ in range(repeats))
    return times


def milliseconds(products: Products, kind: str) -> float:
    start = time.perf_counter()
    products.run(kind)
    return 1e3 * (time.perf_counter() - start)


def name_of(layout: Layout) -> str:
    return f"{layout[0] or 'all'}x{layout[1] or 'all'}"


def fastest(times: dict[str, dict[str, float]]) -> dict[str, Layout]:
    """The fastest tiling of each product, from `calibrate`'s times."""
    by_name = {name_of(layout): layout for layout in TILES}
    return {kind: by_name[min(of_kind, key=of_kind.__getitem__)] for kind, of_kind in times.items()}


def floor_variants(setting: Setting, layouts: dict[str, Layout] | None) -> list[Variant]:
    """One row per product count: 3 and 4 with the head trained, 2 with it frozen."""
    counts = (2,) if setting.frozen else (3, 4)
    return [Variant(f"floor-{count}", f"{count} bare products", builder(PRODUCTS[count], layouts)) for count in counts]


def builder(kinds: tuple[str, ...], layouts: dict[str, Layout] | None) -> Callable[[Problem], Step]:
    def build(problem: Problem) -> Step:
        chosen = layouts or fastest(calibrate(problem, repeats=1))
        products = Products(problem, chosen, kinds)

        def run() -> None:
            for kind in kinds:
                products.run(kind)

        return Step(run)

    return build
