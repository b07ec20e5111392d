"""Every setting of a run, once: the command line, args.json and config_checks.py read this dataclass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field
from typing import Any

from spo_kernels.data.columns import COLUMNS
from spo_kernels.integrations.layout import LAYOUTS
from spo_kernels.losses import LOSSES
from spo_kernels.sparsity import MODES, Sparsity
from spo_kernels.train.errors import TrainError

# These may differ between a run and its resumption: they do not change the weights.
RESUME_MAY_CHANGE = frozenset(
    {
        "output_dir",
        "cache_dir",
        "dataset_processes",
        "resume",
        "save_steps",
        "keep_checkpoints",
        "diagnostics",
        "logging_steps",
        "eval_steps",
        "quiet",
    }
)


def option(default: Any, help: str, group: str, choices: tuple[str, ...] = (), of: str | None = None) -> Any:
    """A dataclass field that is also a command-line option.

    `of` says which runs read it: those on "pairs" (--stage preference), those of "adapters" (--lora-r), or all.
    """
    metadata = {"help": help, "group": group, "choices": choices, "of": of}
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def as_flags(names: Iterable[str]) -> str:
    """Options by the names of their fields: "lora_r" is "--lora-r"."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run; field `grad_accum` is option `--grad-accum`."""

    model: str = option(MISSING, "model, or PEFT adapter, to train: hub id or local folder", "model")
    dataset: str = option(MISSING, "training data: hub id, folder, or a .jsonl, .json or .parquet file", "data")
    output_dir: str = option(MISSING, "folder for the model, metrics.jsonl and checkpoints", "output")

    ref_model: str | None = option(
        None,
        "reference model: hub id or local folder (default: the model as loaded)",
        "model",
        of="pairs",
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the model", "model")
    lora_r: int = option(0, "rank of LoRA adapters; 0 trains the whole model", "model")
    lora_alpha: int = option(16, "LoRA scale: adapters are multiplied by alpha / r", "model", of="adapters")
    lora_dropout: float = option(0.0, "dropout probability in front of the adapters", "model", of="adapters")
    lora_targets: str = option(
        "all-linear",
        "modules that get adapters, comma separated (all-linear: all but the head)",
        "model",
        of="adapters",
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward to save memory", "model")
    dropout: bool = option(
        False, "keep the dropout that the model's configuration has; --lora-dropout is apart", "model"
    )
    dtype: str | None = option(
        None,
        "of the weights; float16 only for the frozen base of adapters (default: float32; with --bf16, bfloat16 for "
        "the frozen base of adapters)",
        "model",
        ("float32", "bfloat16", "float16"),
    )
    attn_implementation: str | None = option(
        None, "attention of transformers, such as sdpa, eager, flash_attention_2 (default: the model's)", "model"
    )
    bf16: bool = option(False, "compute in bfloat16; trained weights stay float32", "model")

    stage: str = option(
        "preference",
        "what to train on: prompt/completion or prompt/chosen/rejected",
        "objective",
        ("sft", "preference"),
    )
    loss: str = option(
        "spo", f"preference loss, see docs/objectives.md: {', '.join(sorted(LOSSES))}", "objective", of="pairs"
    )
    base_loss: str | None = option(None, "loss that spo wraps, any of the same (default: dpo)", "objective", of="pairs")
    beta: float | None = option(
        None,
        "scale of the implicit reward (default: the loss's own, 0.1 for dpo)",
        "objective",
        of="pairs",
    )
    spo_weight: float | None = option(
        None, "weight of the spo penalty (default: the loss's own)", "objective", of="pairs"
    )
    spo_penalty: str | None = option(
        None, "form of the spo penalty: nll or hinge (default: nll)", "objective", of="pairs"
    )
    spo_value: str | None = option(
        None,
        "value in the hinge: reference, or input: column spo_value of the data (default: reference, unless "
        "--spo-inner-steps computes it)",
        "objective",
        of="pairs",
    )
    spo_epsilon: float | None = option(None, "slack of the hinge, in nats (default: 0)", "objective", of="pairs")
    spo_normalization: str | None = option(
        None,
        "NLL of the chosen response: mean over tokens or sum (default: mean)",
        "objective",
        of="pairs",
    )
    spo_inner_steps: int = option(
        0,
        "SGD steps on the micro-batch's chosen responses after which the hinge's value is taken, with weights put "
        "back; 0: none. Each costs a forward and a backward of the chosen half, and the value one more forward; in "
        "all, a copy of the trained weights and of their gradient. A reconstruction, not verified against the paper, "
        "whose single step is 1",
        "objective",
        of="pairs",
    )
    spo_inner_lr: float | None = option(
        None,
        "learning rate of --spo-inner-steps, which need one: the paper's is not known",
        "objective",
        of="pairs",
    )
    loss_arg: tuple[str, ...] = option(
        (), "any field of the loss as KEY=VALUE; may be repeated", "objective", of="pairs"
    )
    ld_alpha: float | None = option(
        None,
        "LD-DPO: tokens beyond the length of the pair's shorter response count this much in its log-prob, for policy "
        "and reference (default: 1)",
        "objective",
        of="pairs",
    )
    pair_input: tuple[str, ...] = option(
        (),
        "data column of a number per pair that the loss reads, as NAME=COLUMN, such as offset=score_margin for odpo; "
        "may be repeated (default: the column of that name)",
        "objective",
        of="pairs",
    )
    reference: str = option(
        "precompute",
        "reference log-probs: computed once and cached on disk, or online with a frozen copy",
        "objective",
        ("precompute", "online"),
        of="pairs",
    )
    cache_dir: str | None = option(
        None,
        "folder of cached log-probs (default: OUTPUT_DIR/reference-cache)",
        "objective",
        of="pairs",
    )

    dataset_config: str | None = option(None, "configuration of a hub data set that has several", "data")
    columns: tuple[str, ...] = option(
        (), "columns that are called something else in the data, such as chosen=win,rejected=lose", "data"
    )
    dataset_processes: int = option(1, "processes that tokenise the data", "data")
    template_date: str | None = option(
        None,
        "day that chat templates which print the date take for today, as YYYY-MM-DD (default: the day on which the run "
        "began, also when it is resumed)",
        "data",
    )
    split: str = option("train", "split of a hub data set to train on", "data")
    eval_dataset: str | None = option(None, "evaluation data: hub id or file", "data")
    eval_split: str = option("test", "split of a hub data set to evaluate on", "data")
    eval_fraction: float = option(
        0.0,
        "share of the prompts held out for evaluation, chosen by --seed; a prompt is never on both sides",
        "data",
    )
    max_length: int = option(1024, "limit of prompt plus response, in tokens; longer responses are cut", "data")
    max_prompt_length: int | None = option(
        None, "limit of the prompt, in tokens; a longer one is an error (default: max_length - 1)", "data"
    )
    drop_overlong: bool = option(
        False, "drop records whose prompt is too long, and say how many, instead of stopping", "data"
    )

    max_steps: int = option(0, "optimizer steps; 0: as many as --epochs needs", "optimization")
    epochs: float = option(1.0, "passes over the data, when --max-steps is 0", "optimization")
    batch_size: int = option(8, "pairs or examples in one forward, per device", "optimization")
    grad_accum: int = option(1, "forwards per optimizer step", "optimization")
    tokens_per_batch: int | None = option(
        None,
        "tokens in one forward at most, per device, in as many forwards as that takes; an optimizer step still has "
        "batch_size x grad_accum records per device (default: batch_size records in one forward; on a CPU 1024 tokens "
        "where these are more)",
        "optimization",
    )
    learning_rate: float = option(5e-6, "peak learning rate of AdamW", "optimization")
    warmup_steps: int = option(0, "optimizer steps of linear warm-up", "optimization")
    schedule: str = option(
        "linear", "learning rate after the warm-up", "optimization", ("linear", "cosine", "constant")
    )
    weight_decay: float = option(0.0, "AdamW weight decay of matrices (never of norms and biases)", "optimization")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never", "optimization")
    seed: int = option(0, "seed of data order, hold-out, dropout and adapters", "optimization")
    deterministic: bool = option(
        False,
        "use deterministic GPU algorithms, so that runs repeat bit for bit (CPU runs do anyway)",
        "optimization",
    )

    workspace_mib: int | None = option(
        None, "bound on the fused loss's temporaries, MiB (default: the library's)", "kernels"
    )
    backend: str | None = option(None, "backend of the fused loss (default: the best available)", "kernels")
    layout: str = option(
        "auto",
        "rows of the backbone in a preference run: without padding and each prompt once where the model takes it, "
        "see docs/packing.md",
        "kernels",
        LAYOUTS,
        of="pairs",
    )
    sparsity: str = option(
        "exact",
        "which blocks of the vocabulary the backward multiplies: all, those outside of a certified probability mass "
        "per token, or an unbiased sample; pays for models whose softmax is concentrated, see docs/sparsity.md",
        "kernels",
        MODES,
    )
    sparsity_tolerance: float | None = option(
        None, "probability mass per token that --sparsity may leave out or sample (default: 2^-8)", "kernels"
    )

    save_steps: int = option(
        500, "optimizer steps between checkpoints; 0: only one, when a signal ends the run", "output"
    )
    keep_checkpoints: int = option(2, "newest checkpoints to keep; 0: all", "output")
    resume: bool = option(False, "go on from the newest complete checkpoint in OUTPUT_DIR", "output")
    diagnostics: bool = option(
        False,
        "log gradient ratio, likelihood displacement and lost mass of the pairs, relative to the reference (the "
        "model as loaded, for losses without one), whose log-probs are then precomputed",
        "output",
        of="pairs",
    )
    logging_steps: int = option(10, "optimizer steps between lines in metrics.jsonl", "output")
    eval_steps: int = option(0, "optimizer steps between evaluations; 0: only before and after training", "output")
    quiet: bool = option(False, "no progress bar", "output")

    @property
    def column_names(self) -> dict[str, str]:
        """What `--columns` says: the data's name for each of ours."""
        given = [pair for option in self.columns for pair in option.split(",") if pair.strip()]
        pairs = [[part.strip() for part in pair.partition("=")] for pair in given]
        for name, equals, column in pairs:
            known = COLUMNS[self.stage]
            if not equals or not column:
                raise TrainError(f"--columns must be NAME=COLUMN,..., got {name + equals!r}")
            if name not in known:
                raise TrainError(f"--columns {name}={column}: {name} is not read; read are {', '.join(known)}")
        return {name: column for name, _, column in pairs}

    @property
    def backward(self) -> Sparsity:
        """What `--sparsity` and `--sparsity-tolerance` say."""
        return Sparsity(self.sparsity, self.sparsity_tolerance or Sparsity.tolerance)

    @property
    def workspace_bytes(self) -> int | None:
        return None if self.workspace_mib is None else self.workspace_mib << 20
