"""The longest pair that this machine trains, and what each length costs; TRL's trainer beside it where it is installed.

    python -m examples.long_pair --memory-gib 4
    python -m examples.long_pair --model Qwen/Qwen3-0.6B            # on a GPU: as much as it has

Lengths are doubled until one does not fit, then halved in between. Each is trained in a process of its own: one step of
DPO with AdamW and gradient checkpointing, in TRL too; ours with `save_on_cpu` on a GPU, which keeps what the backward
needs in the machine's memory. A quarter of a sequence is prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

MULTIPLE = 64
Row = dict[str, Any]


def ours(model: Any, length: int, device: str) -> float:
    """Seconds of a step of `FusedPreferenceModel`."""
    import torch

    from spo_kernels.integrations.transformers import FusedPreferenceModel, PairCollator, precompute_ref_logps

    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {name: value.to(device) for name, value in PairCollator(0)([pair(length)]).items()}
    logps = precompute_ref_logps(model, [batch]).T.flatten().to(device)
    policy = FusedPreferenceModel(model, "dpo", accumulate=True).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    started = time.perf_counter()
    offloaded = torch.autograd.graph.save_on_cpu(pin_memory=True) if device == "cuda" else nullcontext()
    with offloaded:
        loss, _ = policy(**batch, ref_logps=logps)
    loss.backward()
    optimizer.step()
    return time.perf_counter() - started


def trl(model: Any, length: int, device: str) -> float:
    """Seconds of a step of TRL's `DPOTrainer`."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"per_device_train_batch_size": 1, "max_steps": 1, "max_length": None, "learning_rate": 1e-6}
        settings |= {"precompute_ref_log_probs": True, "gradient_checkpointing": True, "bf16": False}
        quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        DPOTrainer(
            model,
            args=DPOConfig(folder, use_cpu=device == "cpu", **settings, **quiet),
            train_dataset=Dataset.from_list([texts(pair(length))]),
            processing_class=tokenizer(),
            callbacks=[clock],
        ).train()
    return clock.seconds


TRAINERS: dict[str, Callable[[Any, int, str], float]] = {"ours": ours, "trl": trl}


def pair(length: int) -> dict[str, list[int]]:
    """Two sequences of that many tokens."""
    ids = [3 + i % 97 for i in range(2 * length)]
    prompt = length // 4
    return {"prompt_ids": ids[:prompt], "chosen_ids": ids[prompt:length], "rejected_ids": ids[length + prompt :]}


def texts(record: dict[str, list[int]]) -> dict[str, str]:
    """The same for TRL, which tokenises itself."""
    return {name.removesuffix("_ids"): "".join(f" {i}" for i in ids) for name, ids in record.items()}


def tokenizer() -> Any:
    """Of `texts`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({str(i): i for i in range(100)}, "0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="1")


def model_of(options: argparse.Namespace, device: str) -> Any:
    """A model of transformers, or a random Llama of the sizes that were asked for."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if options.model:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden, "intermediate_size": 5 * options.hidden // 2}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": options.layers}
    config = LlamaConfig(vocab_size=options.vocabulary, max_position_embeddings=2 * options.longest, **sizes)
    return AutoModelForCausalLM.from_config(config).to(device)


def train(options: argparse.Namespace, trainer: str, length: int) -> Row:
    """One step in this process: its seconds, and the peak of its memory."""
    import torch

    from spo_kernels.train.metrics import peak_memory_mib

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.memory_gib:
        threading.Thread(target=end_above, args=(options.memory_gib, torch.device(device)), daemon=True).start()
    seconds = TRAINERS[trainer](model_of(options, device), length, device)
    return {"seconds": seconds, "peak_gib": peak_memory_mib(torch.device(device)) / 1024}


def end_above(gib: float, device: Any) -> None:
    """End this process once its memory has been more than that.

    Not RLIMIT_DATA: what libraries reserve and do not use counts there, Arrow's gigabyte in TRL for one.
    """
    # imported here: a process begins with the peak of the one that started it
    from spo_kernels.train.metrics import peak_memory_mib

    while peak_memory_mib(device) <= 1024 * gib:
        time.sleep(0.02)
    print(f"took more than {gib:g} GiB", file=sys.stderr, flush=True)
    os._exit(1)


def in_a_process(arguments: list[str], trainer: str, length: int) -> Row:
    """`train` elsewhere; why not, where it did not fit."""
    command = [sys.executable, "-m", "examples.long_pair", *arguments, "--trainers", trainer, "--only", str(length)]
    done = subprocess.run(command, capture_output=True, text=True)
    row: Row = {"trainer": trainer, "length": length}
    if done.returncode == 0:
        return row | json.loads(done.stdout.splitlines()[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return row | {"reason": said[-1].strip() if said else f"ended with {done.returncode}"}


def search(run: Callable[[int], Row], shortest: int, longest: int, halvings: int) -> list[Row]:
    """Lengths doubled until one does not fit or is the longest that is asked for; then halved in between."""
    rows = [run(shortest)]
    while "reason" not in rows[-1] and rows[-1]["length"] < longest:
        rows.append(run(min(2 * rows[-1]["length"], longest)))
    fits = max((row["length"] for row in rows if "reason" not in row), default=0)
    fails = next((row["length"] for row in rows if "reason" in row), None)
    for _ in range(halvings if fits and fails else 0):
        length = (fits + fails) // 2 // MULTIPLE * MULTIPLE
        if not fits < length < fails:
            break
        rows.append(run(length))
        fits, fails = (fits, length) if "reason" in rows[-1] else (length, fails)
    return sorted(rows, key=lambda row: row["length"])


def table(rows: list[Row]) -> str:
    """A line for each length."""
    lines = ["| trainer | tokens of a sequence | peak GiB | step s | tokens/s |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        if "reason" in row:
            cells = f"does not fit: {row['reason'][:80]} | | "
        else:
            cells = f"{row['peak_gib']:.2f} | {row['seconds']:.1f} | {2 * row['length'] / row['seconds']:.0f}"
        lines.append(f"| {row['trainer']} | {row['length']} | {cells} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m examples.long_pair", description=__doc__.splitlines()[0])
    made.add_argument("--memory-gib", type=float, help="resident memory that a process may take (default: no limit)")
    made.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    made.add_argument("--shortest", type=int, default=512, help="tokens of a sequence, to begin with")
    made.add_argument("--longest", type=int, default=65536, help="tokens of a sequence, to end with")
    made.add_argument("--halvings", type=int, default=2, help="lengths between one that fits and one that does not")
    made.add_argument("--model", help="hub id or folder (default: a random Llama)")
    for name, size in (("vocabulary", 32768), ("hidden", 256), ("layers", 4)):
        made.add_argument(f"--{name}", type=int, default=size, help="of the random Llama")
    made.add_argument("--only", type=int, help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> list[Row]:
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    if options.only:
        print(json.dumps(train(options, options.trainers[0], options.only)))
        return []
    rows = []
    for trainer in options.trainers:
        found = search(
            lambda n, t=trainer: in_a_process(given, t, n), options.shortest, options.longest, options.halvings
        )
        rows += found
        print(
            f"{trainer}: {max((row['length'] for row in found if 'reason' not in row), default=0)} tokens",
            file=sys.stderr,
        )
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
