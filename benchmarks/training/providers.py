"""The trainers. Each trains a job's steps and returns the loss of each step."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .settings import BETA, LORA, MAX_LENGTH, Job

Train = Callable[[Job], list[float]]


@dataclass(frozen=True)
class Provider:
    """`load` imports the trainer; `floor` names the provider whose floor counts, which has the same imports.

    `lays` says whether it can do without padding.
    """

    name: str
    about: str
    load: Callable[[], Train]
    floor: str
    lays: bool = False


def load_trl() -> Train:
    from trl import DPOConfig, DPOTrainer

    return lambda job: dpo(job, DPOTrainer, DPOConfig)


def load_patched() -> Train:
    train = load_trl()
    from spo_kernels.integrations.trl import patch_trl

    def run(job: Job) -> list[float]:
        with patch_trl():
            return train(job)

    return run


def load_cce() -> Train:
    """TRL with the fastest exact head beside ours on a CPU, called where `patch_trl` has ours called."""
    train = load_trl()
    from spo_kernels.integrations.trl_seam import HEAD, find_seam

    from .cce_head import CCEHead

    module, replaced = find_seam()

    def run(job: Job) -> list[float]:
        with ExitStack() as stack:
            for name, ours in replaced.items():
                stack.enter_context(patch.object(module, name, CCEHead if name == HEAD else ours))
            return train(job)

    return run


def load_fused() -> Train:
    from spo_kernels.integrations.trl import FusedDPOConfig, FusedDPOTrainer

    return lambda job: dpo(job, FusedDPOTrainer, FusedDPOConfig, layout=job.layout, workspace_mib=job.workspace_mib)


def load_spo_train() -> Train:
    import spo_kernels.train.run  # noqa: F401 (the command line imports it late)

    return spo_train


def dpo(job: Job, trainer: Any, config: Any, **more: Any) -> list[float]:
    """TRL's trainer, or one with its constructor."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    arguments = config(
        output_dir=job.output,
        beta=BETA,
        max_length=MAX_LENGTH,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=job.batch,
        max_steps=job.all_steps,
        train_sampling_strategy="sequential",
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        gradient_checkpointing=job.gradient_checkpointing,
        bf16=False,
        use_cpu=True,
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )
    rows = [json.loads(line) for line in (Path(job.pairs) / "ordered.jsonl").read_text().splitlines()]
    made = trainer(
        model=job.model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora_config(LoraConfig) if job.tuning == "lora" else None,
    )
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def lora_config(kind: Any) -> Any:
    return kind(**LORA, target_modules="all-linear", task_type="CAUSAL_LM")


def spo_train(job: Job) -> list[float]:
    from spo_kernels.train.cli import main

    options: dict[str, Any] = {
        "model": job.model,
        "dataset": Path(job.pairs) / "drawn.jsonl",
        "output-dir": job.output,
        "layout": job.layout,
        "loss": "dpo",
        "beta": BETA,
        "max-length": MAX_LENGTH,
        "batch-size": job.batch,
        "max-steps": job.all_steps,
        "learning-rate": job.learning_rate,
        "schedule": "constant",
        "logging-steps": 1,
        "save-steps": 0,
    }
    if job.tuning == "lora":
        options |= {f"lora-{name.removeprefix('lora_')}": value for name, value in LORA.items()}
    if job.workspace_mib:
        options["workspace-mib"] = job.workspace_mib
    flags = ["--quiet", *(["--gradient-checkpointing"] if job.gradient_checkpointing else [])]
    status = main([*flags, *(text for key, value in options.items() for text in (f"--{key}", str(value)))])
    if status:
        raise RuntimeError(f"spo-train: exit status {status}")
    lines = (Path(job.output) / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["split"] == "train"]


def name_of(provider: str, layout: str) -> str:
    """What a row is called."""
    found = PROVIDERS[provider]
    return f"{found.about}, {layout}" if found.lays else found.about


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("trl", "TRL's DPOTrainer", load_trl, "trl"),
        Provider("trl_patched", "the same after patch_trl()", load_patched, "trl"),
        Provider("trl_cce", "the same with cut-cross-entropy's head", load_cce, "trl_cce"),
        Provider("fused_trainer", "FusedDPOTrainer", load_fused, "trl", lays=True),
        Provider("spo_train", "spo-train", load_spo_train, "spo_train", lays=True),
    )
}
