"""`spo-extrapolate`: the step between rounds of Accelerated Preference Optimization (arXiv 2410.06293, eq. 3.6).

    θ_{t+1} = θ̂_{t+1} + α (θ̂_{t+1} - θ̂_t)

θ̂_t and θ̂_{t+1} are what two rounds of training gave; the result is where the next round starts, and its reference.
In the paper α = 0.3, and the last round is not extrapolated. On weights this is exact for softmax-linear policies only.

Weights are read and written a few MiB at a time, computed in float32 (float64 ones in float64) and rounded once.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from spo_kernels.commands import call
from spo_kernels.commands.lora_extrapolate import ADAPTER_CONFIG, extrapolate_adapter
from spo_kernels.commands.weight_files import FLOATS, WeightFiles, WeightWriter
from spo_kernels.train.errors import TrainError
from spo_kernels.train.files import whole, writing

CHUNK_BYTES = 16 << 20
# What of a model folder is not weights, but needed to load it.
COMPANIONS = [
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model", "chat_template*", "*processor_config.json", "*.py"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="earlier", required=True, type=Path, help="model folder of the earlier round")
    parser.add_argument("--to", dest="later", required=True, type=Path, help="model folder of the later round")
    parser.add_argument("--alpha", type=float, default=0.3, help="how far beyond the later one (default: 0.3)")
    parser.add_argument("--output-dir", required=True, type=Path, help="folder to make")


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    extrapolate(arguments.earlier, arguments.later, arguments.alpha, arguments.output_dir)


def extrapolate(earlier: Path, later: Path, alpha: float, output: Path) -> None:
    """Write `later + alpha * (later - earlier)` as a model folder, which appears complete or not at all.

    Args:
        earlier, later: Model folders with the same tensors: one safetensors file, or shards with an index (`later`'s
            are kept). Integer tensors are copied from `later`. Or two LoRA adapters of one base model, see
            `extrapolate_adapter`.
        alpha: α, any finite number; 0.3 in the paper, -1 gives `earlier`.
        output: Must not exist.

    Raises:
        TrainError: A folder or tensor is not as expected; the message names it.
    """
    if not math.isfinite(alpha):
        raise TrainError(f"--alpha must be a finite number, got {alpha}")
    for option, folder in (("--from", earlier), ("--to", later)):
        if not folder.is_dir():
            raise TrainError(f"{option} {folder}: no such folder")
    adapters = [(folder / ADAPTER_CONFIG).exists() for folder in (earlier, later)]
    if adapters[0] != adapters[1]:
        which = earlier if adapters[0] else later
        raise TrainError(f"{which} is a PEFT adapter and the other is a model; merge it into its base first")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise TrainError(f"--output-dir {output} exists already and is not overwritten")
    with writing(f"--output-dir {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
    with whole(output, folder=True) as folder:
        if adapters[0]:
            extrapolate_adapter(earlier, later, alpha, folder)
        else:
            extrapolate_weights(WeightFiles(earlier), WeightFiles(later), alpha, folder)
        _copy_companions(later, folder)
        settings = {"command": "extrapolate", "from": str(earlier), "to": str(later), "alpha": alpha}
        (folder / "args.json").write_text(json.dumps(settings, indent=2) + "\n")


def extrapolate_weights(earlier: WeightFiles, later: WeightFiles, alpha: float, folder: Path) -> None:
    """The weight files of `later`'s layout, extrapolated into `folder`."""
    _check_same(earlier, later)
    later.copy_index(folder)
    for file in later.files:
        with WeightWriter(folder / file.name, file) as writer:
            for name in file.names:
                tensor = later.tensors[name]
                if tensor.dtype not in FLOATS:
                    for chunk in later.chunks(name, CHUNK_BYTES):
                        writer.write(chunk)
                    continue
                dtype = FLOATS[tensor.dtype]
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                pairs = zip(earlier.chunks(name, CHUNK_BYTES), later.chunks(name, CHUNK_BYTES), strict=True)
                for old, new in pairs:
                    before, after = (torch.frombuffer(c, dtype=dtype).to(wide) for c in (old, new))
                    result = (after + alpha * (after - before)).to(dtype)
                    if not bool(result.isfinite().all()) and bool((before + after).isfinite().all()):
                        raise TrainError(f"{later.folder}: {name} leaves the range of {tensor.dtype}; lower --alpha")
                    writer.write(result.view(torch.uint8).numpy())


def _check_same(earlier: WeightFiles, later: WeightFiles) -> None:
    """Same names, shapes and dtypes, or a TrainError that names the first tensor that differs."""
    for name in sorted(earlier.tensors.keys() ^ later.tensors.keys()):
        there, missing = (earlier, later) if name in earlier.tensors else (later, earlier)
        raise TrainError(
            f"{there.folder} has a tensor {name}, {missing.folder} has none; both must be saved the same way "
            "(a tied head only counts once where tie_word_embeddings is set)"
        )
    for name, tensor in later.tensors.items():
        other = earlier.tensors[name]
        if other.shape != tensor.shape:
            raise TrainError(f"{name} is {other.shape} in {earlier.folder} and {tensor.shape} in {later.folder}")
        if other.dtype != tensor.dtype:
            raise TrainError(f"{name} is {other.dtype} in {earlier.folder} and {tensor.dtype} in {later.folder}")
        if tensor.dtype.startswith("F") and tensor.dtype not in FLOATS:
            raise TrainError(f"{name} is {tensor.dtype}: quantised weights can't be extrapolated without their scales")


def _copy_companions(source: Path, folder: Path) -> None:
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def main(argv: Sequence[str] | None = None) -> int:
    return call(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
