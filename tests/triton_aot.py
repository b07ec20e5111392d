"""Compiles every Triton kernel ahead of time for one architecture and prints one JSON line per variant.

`python -m tests.triton_aot sm_90`, or `... sm_90 few`; no GPU, and no TRITON_INTERPRET: interpreted functions cannot be
compiled.
NVIDIA: registers and spills from the cubin, by `cuobjdump`. AMD: the counts in the code object's metadata.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spo_kernels.backends.contract import MASS_BLOCK
from spo_kernels.backends.triton import config
from spo_kernels.backends.triton.config import Launch
from spo_kernels.backends.triton.pair_loss import _pair_loss_kernel
from spo_kernels.backends.triton.scale_rows import _scale_rows_kernel
from spo_kernels.backends.triton.tile_grad import _tile_grad_kernel
from spo_kernels.backends.triton.tile_stats import _tile_stats_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
FLOAT, HALF = "*fp32", "*bf16"
# what the launcher says of an address, a row's width or a stride that is a multiple of 16
ALIGNED = [["tt.divisibility", 16]]

# what of a tile may be no multiple of 16: everything of a view of another matrix; of an odd vocabulary's last slice its
# columns, while its rows are apart as others are
VIEW = ("tile_ptr", "out_ptr", "x_ptr", "columns", "tile_stride", "out_stride", "block_lse_stride", "x_stride")
LAST_SLICE = ("columns",)
MIXED = ("tile_ptr", "tile_stride")  # a tile that is a view, written to one that is none

# 16 bytes at a time in PTX, on gfx942 and on gfx1100
WIDE_ACCESSES = (".v4.", "dwordx4", "global_load_b128", "buffer_load_b128")

# LOCAL and STACK count what spills; a kernel without arrays of its own has no other use for them
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Case:
    """One kernel specialised as a launcher specialises it."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    launch: Launch
    ragged: tuple[str, ...] = ()
    candidate: bool = False  # the autotuner's, not the table's


def _options(launch: Launch) -> dict[str, int]:
    return {"UNROLL": launch.unroll, "LANES": launch.lanes}


def _unique(launches: list[Launch]) -> list[Launch]:
    return list(dict.fromkeys(launches))


def _stats_cases(architecture: str) -> Iterator[Case]:
    pointers = dict.fromkeys(("tile_ptr", "max_ptr", "sum_ptr", "label_logit_ptr"), FLOAT) | {"labels_ptr": "*i64"}
    sizes = dict.fromkeys(("columns", "tile_stride", "out_stride", "block_lse_stride"), "i32") | {"scale": "fp32"}
    plain = dict.fromkeys(("bias_ptr", "shifted_sum_ptr", "square_sum_ptr", "block_lse_ptr", "rescale_ptr", "out_ptr"))
    plain |= {"softcap": None, "MASS_BLOCK": MASS_BLOCK, "WHOLE_ROW": False}
    moments = dict.fromkeys(("shifted_sum_ptr", "square_sum_ptr", "bias_ptr"), FLOAT) | {"softcap": "fp32"}
    table = config.launch_for("tile_stats", architecture)
    yield Case("tile_stats", _tile_stats_kernel, pointers | sizes, plain, table)
    for launch in _unique([table, *config.CANDIDATES["tile_stats"]]):
        types = pointers | sizes | moments
        yield Case("tile_stats all outputs", _tile_stats_kernel, types, plain, launch, candidate=launch != table)
    masses = pointers | sizes | moments | {"block_lse_ptr": FLOAT}
    yield Case("tile_stats masses", _tile_stats_kernel, masses, plain, config.with_masses(architecture))
    for ragged in (VIEW, LAST_SLICE):
        yield Case("tile_stats ragged", _tile_stats_kernel, pointers | sizes, plain, table, ragged=ragged)
        launch = config.whole_row(4096, architecture, True)
        types, row = pointers | sizes | {"rescale_ptr": FLOAT, "out_ptr": HALF}, plain | {"WHOLE_ROW": True}
        yield Case("tile_stats ragged row", _tile_stats_kernel, types, row, launch, ragged=ragged)
    for out in (HALF, FLOAT):
        writes = {"rescale_ptr": FLOAT, "out_ptr": out}
        for label, added in ((f" to {out[1:]}", writes), (f" all outputs to {out[1:]}", moments | writes)):
            types = pointers | sizes | added
            for columns in (512, 4096, 8192):
                launch = config.whole_row(columns, architecture, out == HALF)
                name = f"tile_stats row of {columns}{label}"
                yield Case(name, _tile_stats_kernel, types, plain | {"WHOLE_ROW": True}, launch)
            twice = config.loop_twice(architecture, out == HALF)
            yield Case(f"tile_stats twice{label}", _tile_stats_kernel, types, plain, twice)


def _grad_cases(architecture: str) -> Iterator[Case]:
    base = {"tile_ptr": FLOAT, "labels_ptr": "*i64", "lse_ptr": FLOAT, "lse_rest_ptr": FLOAT, "out_ptr": HALF}
    base |= dict.fromkeys(("columns", "tile_stride", "out_stride"), "i32") | {"scale": "fp32"}
    names = ("logp", "lse", "entropy", "log_sum_p2")
    gradients = [f"grad_{name}_ptr" for name in names]
    plain = dict.fromkeys(("bias_ptr", "softcap", "entropy_ptr", "log_sum_p2_ptr", *gradients))
    full = dict.fromkeys(("bias_ptr", "entropy_ptr", "log_sum_p2_ptr", *gradients), FLOAT) | {"softcap": "fp32"}
    only = {"grad_logp_ptr": FLOAT}
    table = config.launch_for("tile_grad", architecture)
    yield Case("tile_grad", _tile_grad_kernel, base | only, plain, table)
    yield Case("tile_grad fp32", _tile_grad_kernel, base | only | {"out_ptr": FLOAT}, plain, table)
    for launch in _unique([table, *config.CANDIDATES["tile_grad"]]):
        types = base | full
        yield Case("tile_grad all outputs", _tile_grad_kernel, types, plain, launch, candidate=launch != table)
    for ragged in (VIEW, LAST_SLICE, MIXED):
        yield Case("tile_grad ragged", _tile_grad_kernel, base | only, plain, table, ragged=ragged)


def _small_cases(architecture: str) -> Iterator[Case]:
    types = {"x_ptr": FLOAT, "factors_ptr": FLOAT, "columns": "i32", "x_stride": "i32"}
    table = config.launch_for("scale_rows", architecture)
    yield Case("scale_rows", _scale_rows_kernel, types, {}, table)
    yield Case("scale_rows half", _scale_rows_kernel, types | {"x_ptr": HALF}, {}, table)
    for ragged in (VIEW, LAST_SLICE):
        yield Case("scale_rows ragged", _scale_rows_kernel, types | {"x_ptr": HALF}, {}, table, ragged=ragged)
    names = ("logp_ptr", "summary_ptr", "coefficients_ptr")
    base = dict.fromkeys(names, FLOAT) | {"labels_ptr": "*i64"}
    base |= dict.fromkeys(("pairs", "tokens", "width", "ignore_index"), "i32")
    base |= dict.fromkeys(("beta", "weight", "epsilon", "factor"), "fp32")
    absent = dict.fromkeys(("cu_seqlens_ptr", "reference_ptr", "value_ptr"))
    launch = config.launch_for("pair_loss", architecture)
    reference = {"reference_ptr": FLOAT}
    packed = reference | {"cu_seqlens_ptr": "*i32"}
    for label, added, penalty, mean in (
        ("dpo", reference, "none", True),
        ("spo nll", packed, "nll", True),
        ("spo hinge", packed | {"cu_seqlens_ptr": "*i64"}, "hinge", False),
        ("spo hinge input", packed | {"value_ptr": FLOAT}, "hinge", True),
    ):
        constants = absent | {"USE_REFERENCE": True, "PENALTY": penalty, "MEAN": mean}
        yield Case(f"pair_loss {label}", _pair_loss_kernel, base | added, constants, launch)


def cases(architecture: str, few: bool = False) -> list[Case]:
    """Every kernel with every configuration that the tables and the autotuner hold for it.

    A `few`: of each kernel and launch the last one, which has the most outputs.
    """
    found = [*_stats_cases(architecture), *_grad_cases(architecture), *_small_cases(architecture)]
    return list({(case.kernel, case.launch): case for case in found}.values()) if few else found


def compile_case(case: Case, architecture: str) -> Any:
    """The compiled kernel."""
    constants = {**case.constants, **_options(case.launch)}
    constants = {name: value for name, value in constants.items() if name not in case.types}
    signature = {}
    attributes = {}
    for index, name in enumerate(case.kernel.arg_names):
        signature[name] = "constexpr" if name in constants else case.types[name]
        if name not in constants and name not in case.ragged and signature[name][0] in "*i":
            attributes[(index,)] = ALIGNED
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.launch.num_warps, "num_stages": 1}
    return triton.compile(source, target=TARGETS[architecture], options=options)


def nvidia_usage(compiled: Any) -> dict[str, int]:
    """What the assembler recorded in the cubin, read by the tool that Triton ships."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [cuobjdump, "--dump-resource-usage", cubin.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(number) for number in _USAGE.search(report).groups())
    return {"registers": registers, "spills": stack + local}


def amd_usage(compiled: Any) -> dict[str, int]:
    """The code object's own counts."""
    text = compiled.asm["amdgcn"]

    def count(field: str) -> int:
        return sum(int(number) for number in re.findall(rf"\.{field}:\s*(\d+)", text))

    return {"registers": count("vgpr_count"), "spills": count("vgpr_spill_count") + count("sgpr_spill_count")}


def narrow_offsets(compiled: Any) -> list[str]:
    """Products in fewer than 64 bits in which a stride takes part; a row's offset must never be one."""
    lines = compiled.asm["ttir"].splitlines()
    strides = ("stride", "width")
    return [line.strip() for line in lines if "muli" in line and any(s in line for s in strides) and "i64" not in line]


def wide_offsets(compiled: Any) -> int:
    """Products of two 64-bit scalars: the rows' offsets."""
    return len(re.findall(r"arith\.muli .* : i64", compiled.asm["ttir"]))


def main() -> None:
    architecture, *few = sys.argv[1:]
    for case in cases(architecture, bool(few)):
        compiled = compile_case(case, architecture)
        usage = amd_usage(compiled) if architecture.startswith("gfx") else nvidia_usage(compiled)
        row = {
            "case": case.name,
            "launch": [case.launch.unroll, case.launch.lanes, case.launch.num_warps],
            "candidate": case.candidate,
            "shared": compiled.metadata.shared,
            "wide_offsets": wide_offsets(compiled),
            "narrow_offsets": narrow_offsets(compiled),
            "vector": any(word in compiled.asm.get("ptx", compiled.asm.get("amdgcn", "")) for word in WIDE_ACCESSES),
            **usage,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
