"""Real data end to end: SFT, then DPO and SPO, on grade-school maths with a small model built from a config.

    python experiments/gsm8k.py --data ../shared/data/gsm8k --output experiments/output/gsm8k
    python experiments/gsm8k.py --check-resume      # also: kill the SPO run half-way, resume, compare bits

Everything is trained through the command line. A fifth of the prompts is held out of the preference data,
with all of their pairs. The model is far too small to do maths: what it can learn from the pairs is how
correct solutions are written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.small_llama import Shape, build_model  # noqa: E402 (the root comes first)

SFT = {"stage": "sft", "epochs": 1, "learning-rate": 2e-3, "warmup-steps": 30, "eval-fraction": 0.05}
PREFERENCE = {"epochs": 1, "learning-rate": 2e-4, "warmup-steps": 10, "eval-fraction": 0.2, "beta": 0.1}
COMMON = {"batch-size": 4, "grad-accum": 4, "max-length": 640, "schedule": "cosine"}
Options = dict[str, Any]


def main() -> None:
    arguments = parse()
    output = Path(arguments.output).resolve()
    if output.exists():
        sys.exit(f"{output} exists; remove it or give another --output")
    data = Path(arguments.data).resolve()
    began = time.perf_counter()
    shape = Shape()
    size = build_model(output / "init", data / "sft.jsonl", shape)
    print(
        f"model: {size / 1e6:.1f} M parameters, vocabulary {shape.vocabulary}; {arguments.threads} threads",
        flush=True,
    )

    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    train(output / "sft", output / "init", data / "sft.jsonl", SFT)
    preference = {**PREFERENCE, "cache-dir": output / "cache"}
    for loss in ("dpo", "spo"):
        train(output / loss, output / "sft", data / "preferences.jsonl", {**preference, "loss": loss})
    print_table(output, ["sft", "dpo", "spo"])
    print_length_baseline(data / "preferences.jsonl")
    if arguments.check_resume:
        check_resume(output, data / "preferences.jsonl", {**preference, "loss": "spo", "save-steps": 20})
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (usage.ru_utime + usage.ru_stime) / 60
    print(f"total {(time.perf_counter() - began) / 60:.1f} minutes, {cpu:.1f} CPU minutes")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=str(ROOT / "../shared/data/gsm8k"), help="folder of sft.jsonl, preferences.jsonl"
    )
    parser.add_argument("--output", default=str(ROOT / "experiments/output/gsm8k"), help="folder to make")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check-resume", action="store_true", help="repeat the SPO run with a SIGKILL in the middle")
    return parser.parse_args()


def command(output: Path, model: Path, data: Path, options: Options) -> list[str]:
    flags = [text for key, value in {**COMMON, **options}.items() for text in (f"--{key}", str(value))]
    paths = ["--model", str(model), "--dataset", str(data), "--output-dir", str(output)]
    return [sys.executable, "-m", "spo_kernels.train", *paths, "--quiet", "--drop-overlong", *flags]


def train(output: Path, model: Path, data: Path, options: Options) -> None:
    began = time.perf_counter()
    subprocess.run(command(output, model, data, options), check=True, cwd=ROOT)
    print(f"{output.name}: {time.perf_counter() - began:.0f} s", flush=True)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["split"] == "eval"]


def print_table(output: Path, runs: list[str]) -> None:
    """Held-out figures before and after. Reward accuracy of an untrained policy is a tie by definition."""
    print("\nheld-out figures, before -> after training")
    columns = {
        "loss": "loss",
        "mean_token_accuracy": "token accuracy",
        "rewards/accuracies": "preference accuracy (reward)",
        "logps/accuracies": "preference accuracy (log-prob)",
        "rewards/margins": "margin",
        "logps/chosen": "logp chosen",
        "logps/rejected": "logp rejected",
    }
    for run in runs:
        before, *_, after = evaluations(output / run)
        for key, title in columns.items():
            if key in before:
                print(f"  {run:4s} {title:31s} {before[key]:9.4f} -> {after[key]:9.4f}")


def print_length_baseline(data: Path) -> None:
    """What a judge scores on the same held-out pairs who only looks at length."""
    from spo_kernels.data import preference_sample, read_records
    from spo_kernels.data.examples import held_out_prompts

    samples = [preference_sample(where, row) for where, row in read_records(str(data))]
    out = held_out_prompts([s.key for s in samples], PREFERENCE["eval-fraction"], seed=0)
    held_out = [sample for sample, chosen in zip(samples, out, strict=True) if chosen]
    longer = sum(len(s.responses[0]) > len(s.responses[1]) for s in held_out) / len(held_out)
    prompts = len({s.key for s in held_out})
    print(f"  {len(held_out)} held-out pairs of {prompts} prompts; the chosen one is longer in {longer:.4f} of them")


def check_resume(output: Path, data: Path, options: Options) -> None:
    """SIGKILL half-way, resume, and compare the weights with those of the run that was left alone."""
    total = max(json.loads(line)["step"] for line in (output / "spo" / "metrics.jsonl").read_text().splitlines())
    killed, half = output / "spo-killed", 20 * (total // 40)
    process = subprocess.Popen(command(killed, output / "sft", data, options), cwd=ROOT)
    while not (killed / f"checkpoint-{half}").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    print(f"\nkilled at step {half} of {total} or just after: exit status {process.wait()}")
    assert not (killed / "model.safetensors").exists()
    subprocess.run([*command(killed, output / "sft", data, options), "--resume"], check=True, cwd=ROOT)
    digests = {
        run: hashlib.sha256((output / run / "model.safetensors").read_bytes()).hexdigest()
        for run in ("spo", "spo-killed")
    }
    for run, digest in digests.items():
        print(f"  {run:12s} model.safetensors sha256 {digest[:32]}")
    print("  the same, bit for bit" if len(set(digests.values())) == 1 else "  DIFFERENT")
    shutil.rmtree(killed)


if __name__ == "__main__":
    main()
