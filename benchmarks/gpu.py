"""GPU benchmark: `python -m benchmarks.gpu`; `--dry-run` goes through all of it on a CPU with tiny shapes.

One process per provider, so that one that fails or hangs costs its own rows. Results are kept as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import gpu_roofline
from .gpu_measure import Stopwatch, make_problem, peak_bytes, sample
from .gpu_providers import all_providers
from .gpu_settings import DRY_SHAPES, SHAPES, GpuJob, key
from .gpu_table import render
from .launch import ROOT, describe_exit
from .machine import commit, cpu_model, version
from .ours import Ours
from .settings import Setting

Row = dict[str, Any]
WORKSPACES = (None, 64 << 20, 128 << 20, 256 << 20, 512 << 20, 1 << 30, 2 << 30, 4 << 30)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    made.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, Triton's kernels interpreted")
    made.add_argument("--minutes", type=float, default=11.0, help="for all of it (default: 11)")
    made.add_argument("--providers", help="comma-separated names (default: all)")
    made.add_argument("--shapes", default="", help="comma-separated places in the list of shapes, from 0")
    made.add_argument("--out", type=Path, help="folder for .json and .md (default: benchmarks/results; dry: /tmp)")
    made.add_argument("--note", default="", help="a line for the report, e.g. how the tests went")
    return made


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def start(job: GpuJob, folder: Path) -> list[Row]:
    """Run one provider; a death is a row for every shape that it left without one."""
    path, out = folder / f"{job.provider}.json", folder / f"{job.provider}.jsonl"
    job.save(path)
    command = [sys.executable, "-m", "benchmarks.gpu_worker", str(path), str(out)]
    environment = dict(os.environ)
    if job.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    try:
        # compiling and making inputs are outside a worker's own count
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=job.seconds + 60, stderr=subprocess.PIPE, text=True
        )
        death = None if done.returncode == 0 else describe_exit(done.returncode, done.stderr)
    except subprocess.TimeoutExpired:
        death = f"no end within {job.seconds + 60:.0f} s"
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if death is not None:
        seen = {row["shape"] for row in rows}
        lost = [key(setting) for setting in job.shapes if key(setting) not in seen]
        lost = lost or [key(job.shapes[-1])]
        rows += [
            {"provider": job.provider, "shape": name, "phase": "all", "status": "failed", "reason": death}
            for name in lost
        ]
    return rows


def progress(provider: str, rows: list[Row]) -> str:
    good = [row for row in rows if row["status"] == "ok"]
    bad = {f"{row['status']}: {row['reason']}" for row in rows if row["status"] != "ok"}
    text = f"{provider}: {len(good)} measured"
    return text + "".join(f"; {reason[:120]}" for reason in sorted(bad))


def sweep(shape: Setting, device: torch.device, until: float) -> list[Row]:
    """Time and memory of the Triton backend against its byte budget, on one shape."""
    rows: list[Row] = []
    problem = make_problem(shape, device)
    clock = Stopwatch(device)
    for workspace in WORKSPACES:
        if time.monotonic() > until:
            break
        row: Row = {"shape": key(shape), "workspace_bytes": workspace}
        try:
            step = Ours.of(problem, "triton", workspace_bytes=workspace).step()
            for name, run in (("forward_ms", step.tokens), ("trained_ms", step.run)):
                assert run is not None
                run()
                found = sample(run, lambda: None, problem.clear, clock, repeats=10, seconds=1.0)
                row[name] = sorted(found.ms)[len(found.ms) // 2]
            row["extra_bytes"] = peak_bytes(step.run, problem.clear, device)
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {str(error)[:120]}"
        say(f"workspace {workspace}: {row}")
        rows.append(row)
    return rows


def describe(device: torch.device, note: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"cpu": cpu_model(), "commit": commit()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["cuda"] = torch.version.cuda or f"hip {torch.version.hip}"
    else:
        facts["device"] = "none: a dry run, its figures mean nothing"
    packages = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")
    facts["versions"] = ", ".join(f"{name} {version(name) or 'absent'}" for name in packages)
    if note:
        facts["note"] = note
    return facts


def save(report: Row, folder: Path, stem: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(report, indent=1))
    (folder / f"{stem}.md").write_text(render(report))


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False; try --dry-run")
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    device = torch.device("cpu" if options.dry_run else "cuda")
    shapes = DRY_SHAPES if options.dry_run else SHAPES
    if options.shapes:
        shapes = tuple(shapes[int(place)] for place in options.shapes.split(","))
    dry_folder = Path(tempfile.gettempdir()) / "spo-gpu-dry-run"
    out = options.out or (dry_folder if options.dry_run else ROOT / "benchmarks" / "results")
    names = options.providers.split(",") if options.providers else ["floor", *all_providers(options.dry_run)]
    until = time.monotonic() + 60 * options.minutes
    stem = "gpu-dry-run" if options.dry_run else time.strftime("gpu-%Y%m%d-%H%M%S")
    report: Row = {
        "machine": describe(device, options.note),
        "paper": gpu_roofline.paper(),
        "shapes": [asdict(shape) for shape in shapes],
        "rows": [],
    }
    print(report["paper"], flush=True)
    failure: str | None = None
    try:
        report["kernels_measured"] = gpu_roofline.measure(device, dry=options.dry_run)
        report["kernels"] = gpu_roofline.measured_table(report["kernels_measured"])
        print(report["kernels"], flush=True)
    except Exception as error:
        # the rest is still worth measuring
        report["kernels"] = failure = f"kernels alone: {type(error).__name__}: {error}"
        say(failure)
    if device.type == "cuda":
        torch.cuda.empty_cache()

    tiles: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory(prefix="spo-gpu-") as scratch:
        for place, name in enumerate(names):
            # two shares stay for the sweep
            share = (until - time.monotonic()) / (len(names) - place + 2)
            seconds = max(15.0, min(120.0, 1.5 * share))
            quick = {"repeats": 3, "sample_seconds": 0.2} if options.dry_run else {}
            rows = start(GpuJob(name, shapes, device.type, seconds, tiles, **quick), Path(scratch))
            tiles |= {row["shape"]: row["tile"] for row in rows if "tile" in row}
            report["rows"] += rows
            save(report, out, stem)
            say(progress(name, rows))
    swept = shapes[:1] if options.dry_run else tuple(shape for shape in shapes[:1] + shapes[3:5])
    report["sweep"] = [row for shape in swept for row in sweep(shape, device, until)]
    save(report, out, stem)
    print("\n" + render(report))
    say(f"wrote {out / stem}.json and .md")
    if failure is not None:
        raise SystemExit(failure)


if __name__ == "__main__":
    main()
