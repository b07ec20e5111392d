"""One long pair through `fused_spo_loss` on a CPU: the peak RSS of the whole process, and its products, counted.

python -m benchmarks.long_pair [--tokens 16384 --vocab 131072 --hidden 512] [--workspace-mib 512]
    [--limit-gib 2.5 --limit-products 3]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .inputs import random_problem
from .machine import describe_machine, machine_line
from .measure import peak_bytes, resident_bytes
from .run import GIB, add_shape, setting_of
from .settings import Setting


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.long_pair",
        description="Forward and backward of one long pair; prints the process's peak RSS.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_shape(made, pairs=1, tokens=16384, hidden=512, vocab=131072)
    made.add_argument("--loss", default="dpo", choices=["dpo", "spo"], help="objective, with its defaults")
    made.add_argument("--backend", help="tile backend (default: the library's choice)")
    made.add_argument("--workspace-mib", type=float, help="workspace_bytes of the call (default: the library's)")
    made.add_argument("--limit-gib", type=float, help="exit with status 1 where the peak is higher")
    made.add_argument("--limit-products", type=float, help="exit with status 1 where more products are made")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    return made


@contextmanager
def counted_products() -> Iterator[list[int]]:
    """Multiply-adds of every product that the library makes meanwhile."""
    from spo_kernels.backends.cpp_products import NativeProducts
    from spo_kernels.backends.products import VendorProducts

    made: list[int] = []
    originals = {owner: owner.matmul for owner in (VendorProducts, NativeProducts)}

    def counting(owner: type, original: Any) -> Any:
        def matmul(self: Any, a: Tensor, b: Tensor, out: Tensor, *, a_rows: Tensor | None = None, **rest: Any) -> None:
            # one class hands a product to the other: only the first of the two calls counts
            if type(self) is owner:
                made.append((a.shape[0] if a_rows is None else a_rows.numel()) * a.shape[1] * b.shape[1])
            original(self, a, b, out, a_rows=a_rows, **rest)

        return matmul

    for owner, original in originals.items():
        setattr(owner, "matmul", counting(owner, original))  # noqa: B010
    try:
        yield made
    finally:
        for owner, original in originals.items():
            setattr(owner, "matmul", original)  # noqa: B010


def measure(setting: Setting, loss_name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds and bytes of one forward and backward. The peak is the whole process's, imports included."""
    from spo_kernels import fused_spo_loss

    # Uniform labels: logits this flat keep the margin of thousands of tokens near 1, where the loss has a gradient.
    problem = random_problem(setting, logit_std=0.1)
    resident = resident_bytes()
    reference = torch.zeros(2 * setting.pairs)
    with counted_products() as made:
        start = time.perf_counter()
        loss, _ = fused_spo_loss(
            problem.hidden, problem.weight, problem.labels, loss=loss_name, ref_logps=reference, **options
        )
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
    assert problem.hidden.grad is not None
    return {
        "loss": loss.item(),
        "dh_norm": problem.hidden.grad.norm(dtype=torch.float32).item(),
        "products": sum(made) / (setting.rows * setting.hidden * setting.vocab),
        "forward_s": middle - start,
        "backward_s": end - middle,
        "inputs_bytes": problem.hidden.nbytes + problem.weight.nbytes + problem.labels.nbytes,
        "gradient_bytes": setting.gradient_bytes,
        "resident_before_bytes": resident,
        "peak_bytes": peak_bytes(),
        "logits_bytes": 4 * setting.rows * setting.vocab,
    }


def main(arguments: list[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    setting = setting_of(chosen)
    if setting.threads:
        torch.set_num_threads(setting.threads)
    options: dict[str, Any] = {"backend": chosen.backend}
    if chosen.workspace_mib:
        options["workspace_bytes"] = int(chosen.workspace_mib * 2**20)
    figures = measure(setting, chosen.loss, options)
    facts = describe_machine(setting.threads)
    print(machine_line(facts))
    print(f"setting: {setting.describe()}, loss {chosen.loss}, backend {chosen.backend or 'automatic'}")
    print(
        f"loss {figures['loss']:.6f}, |dH| {figures['dh_norm']:.6g}; "
        f"forward {figures['forward_s']:.1f} s, backward {figures['backward_s']:.1f} s"
    )
    sizes = {key: figures[f"{key}_bytes"] / GIB for key in ("inputs", "gradient", "resident_before", "logits")}
    print(
        f"inputs {sizes['inputs']:.2f} GiB, gradients {sizes['gradient']:.2f} GiB, RSS before the call "
        f"{sizes['resident_before']:.2f} GiB (fp32 logits alone would be {sizes['logits']:.1f} GiB)"
    )
    print(f"peak RSS of the process: {figures['peak_bytes'] / GIB:.3f} GiB")
    if chosen.json:
        report = {"setting": vars(setting), "machine": facts, "figures": figures}
        chosen.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"products of [N,H] x [H,V], counted: {figures['products']:.3f}")
    if chosen.limit_products and figures["products"] > chosen.limit_products:
        print(f"over the limit of {chosen.limit_products:g} products")
        return 1
    if chosen.limit_gib and figures["peak_bytes"] > chosen.limit_gib * GIB:
        print(f"over the limit of {chosen.limit_gib:g} GiB")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
