"""How each kernel is launched on each class of device: one table of small fixed configurations.

They follow from bytes in flight, not from measurements: a multiprocessor must keep (bandwidth x latency /
multiprocessors) bytes outstanding, 18 KiB on an H100 (3.35 TB/s, 700 ns, 132) and 38 KiB on a B200 (8 TB/s, 148).
A program of 8 warps with 16 float32 per thread holds 16 KiB, and four to six of them share a multiprocessor.
SPO_AUTOTUNE=1 times `CANDIDATES` once per kernel and number of columns instead.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton

from spo_kernels.backends import environment


@dataclass(frozen=True)
class Launch:
    """`unroll x lanes` elements at a time: a thread owns `unroll` groups of 4 neighbours, 16-byte accesses."""

    unroll: int
    lanes: int
    num_warps: int

    @property
    def block(self) -> int:
        """Elements that a program handles at a time."""
        return self.unroll * self.lanes


# a row of this many columns or fewer stays in registers, 16 per thread at 16 warps; at twice as many, some spill
WHOLE_ROW_COLUMNS = 8192

# gfx1100 stands for all of AMD's with 32 threads per warp
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
_WIDE_WARPS = ("gfx942",)  # of 64 threads

# lanes = 4 x threads, so that a reduction over `unroll` stays inside a thread
_TABLE: dict[str, dict[str, Launch]] = {
    "tile_stats": {
        "sm_80": Launch(4, 512, 4),
        "sm_90": Launch(4, 1024, 8),
        "sm_100": Launch(4, 1024, 8),
        "sm_120": Launch(2, 1024, 8),
        "gfx942": Launch(4, 1024, 4),
        "gfx1100": Launch(2, 1024, 8),
    },
    "tile_grad": {
        "sm_80": Launch(4, 512, 4),
        "sm_90": Launch(4, 1024, 8),
        "sm_100": Launch(4, 1024, 8),
        "sm_120": Launch(4, 512, 4),
        "gfx942": Launch(4, 1024, 4),
        "gfx1100": Launch(4, 512, 4),
    },
    # 16 bytes of bfloat16 a lane; 4 wavefronts of gfx942 have twice the lanes
    "scale_rows": dict.fromkeys(ARCHITECTURES, Launch(1, 1024, 4)) | {"gfx942": Launch(1, 2048, 4)},
    "pair_loss": dict.fromkeys(ARCHITECTURES, Launch(1, 1024, 4)),
}

CANDIDATES: dict[str, tuple[Launch, ...]] = {
    "tile_stats": (Launch(2, 1024, 8), Launch(4, 512, 4), Launch(4, 1024, 8), Launch(8, 1024, 8)),
    "tile_grad": (Launch(2, 512, 4), Launch(4, 512, 4), Launch(4, 1024, 8), Launch(8, 1024, 8)),
}


def launch_for(family: str, architecture: str) -> Launch:
    """The table's entry."""
    return _TABLE[family][architecture]


def whole_row(columns: int, architecture: str, narrow: bool) -> Launch:
    """The smallest block that holds a row of `columns` (at most WHOLE_ROW_COLUMNS), 16 elements per thread or more.

    4 to 16 warps of 32 threads, or half as many of 64. `narrow`: the operand is half precision, and
    its 16-byte stores make Triton give 8 neighbours to a thread instead of 4.
    """
    elements = max(2048, triton.next_power_of_2(columns))
    threads = min(512, elements // 16)
    lanes = threads * (8 if narrow else 4)
    return Launch(elements // lanes, lanes, threads // (64 if architecture in _WIDE_WARPS else 32))


def loop_twice(architecture: str, narrow: bool) -> Launch:
    """For rows wider than that."""
    table = launch_for("tile_stats", architecture)
    return replace(table, unroll=table.unroll // 2, lanes=table.lanes * 2) if narrow else table


def with_masses(architecture: str) -> Launch:
    """Fewer elements at a time where block masses are reported too, so that nothing spills."""
    return replace(launch_for("tile_stats", architecture), unroll=2)


@cache
def architecture_of(device: torch.device) -> str:
    """The class of configurations for a device; what no class fits gets its nearest ancestor's."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942" if torch.cuda.get_device_properties(device).warp_size == 64 else "gfx1100"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")


def tuned(family: str, changes: tuple[str, ...]) -> Any:
    """Decorator: the kernel itself, or with SPO_AUTOTUNE=1 the fastest of its candidates for each `columns`.

    `changes` names the buffers that a launch overwrites: timing runs the kernel many times over.
    """

    def decorate(kernel: Any) -> Any:
        if not environment.autotune():
            return kernel
        copies: dict[str, torch.Tensor] = {}

        def keep(arguments: dict[str, Any], reset_only: bool = False) -> None:
            if not reset_only:
                copies.update({name: arguments[name].clone() for name in changes if arguments[name] is not None})

        def restore(arguments: dict[str, Any], exception: Exception | None) -> None:
            while copies:
                name, value = copies.popitem()
                arguments[name].copy_(value)

        options = [
            triton.Config({"UNROLL": c.unroll, "LANES": c.lanes}, num_warps=c.num_warps, num_stages=1)
            for c in CANDIDATES[family]
        ]
        return triton.autotune(options, key=["columns"], pre_hook=keep, post_hook=restore)(kernel)

    return decorate


def resolve(kernel: Any, family: str, architecture: str, forced: Launch | None) -> tuple[Any, dict[str, int]]:
    """What to launch and its keyword arguments: the autotuner's choice only where no configuration is forced."""
    if isinstance(kernel, triton.runtime.Autotuner):
        if forced is None:
            return kernel, {}
        kernel = kernel.fn
    launch = forced or launch_for(family, architecture)
    return kernel, {"UNROLL": launch.unroll, "LANES": launch.lanes, "num_warps": launch.num_warps, "num_stages": 1}
