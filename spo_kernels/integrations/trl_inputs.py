"""What an objective reads of TRL's data beside the two responses, and what `FusedDPOTrainer` cannot give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig

from spo_kernels.integrations.layout import check_layout
from spo_kernels.integrations.token_batches import TokenBudget
from spo_kernels.losses import Objective
from spo_kernels.losses.needs import needs_inputs
from spo_kernels.losses.pairs import PILOTS, coupling_of, token_outputs_of, token_subsets_of
from spo_kernels.losses.reconstructed.spo import SPO_VALUE


def input_columns(args: DPOConfig, objective: Objective) -> tuple[str, ...]:
    """Names of columns that hold the objective's `pair_inputs`, one number per pair."""
    # pilots are found in the step where the reference is evaluated there
    found = set(PILOTS if token_subsets_of(objective) is not None and not args.precompute_ref_log_probs else ())
    found.update([SPO_VALUE] if getattr(args, "spo_inner_steps", 0) else ())
    return tuple(name for name in needs_inputs(objective) if name not in found)


def refuse(args: DPOConfig, objective: Objective, referenced: bool) -> None:
    """Raise ValueError for what cannot be done, with the reason."""
    if "kl" in token_outputs_of(objective):
        raise ValueError(
            f"{objective!r} compares whole distributions with the reference's, of which this trainer has the labels' "
            "log-probabilities only: use spo-train --reference online, or FusedPreferenceModel with reference="
        )
    check_layout(getattr(args, "layout", "auto"))
    mib = getattr(args, "workspace_mib", None)
    if mib is not None and not (isinstance(mib, int) and mib >= 1):
        raise ValueError(f"workspace_mib must be a whole number of MiB >= 1 or None, got {mib!r}")
    _check_tokens_per_batch(args, objective)
    if args.ld_alpha is not None and "sft" in args.loss_type:
        raise ValueError(
            "ld_alpha weighs the tokens of every term of a fused loss, and loss_type 'sft' is the plain mean over "
            "tokens: leave one of them out, or use DPOTrainer"
        )
    if args.sync_ref_model and not referenced:
        raise ValueError(f"sync_ref_model=True needs a reference, and {objective!r} has none")
    if getattr(args, "spo_inner_steps", 0) and args.deepspeed_plugin is not None:
        raise ValueError("spo_inner_steps changes the model's weights, which DeepSpeed shards; use DDP")


def refuse_no_reference(args: DPOConfig, model: Any, given: Mapping[str, Any]) -> None:
    """Raise ValueError where a reference is to be loaded from where the model came from, which is nowhere.

    `given` are the trainer's arguments by name.
    """
    adapted = given.get("peft_config") is not None or hasattr(model, "peft_config")
    if given.get("ref_model") is None and not adapted and not args.precompute_ref_log_probs:
        config = getattr(model, "config", None)
        if config is not None and not config._name_or_path:
            raise ValueError(
                f"ref_model is needed, such as copy.deepcopy(model): this {type(model).__name__} was not loaded from a "
                "name or folder, from which the reference would be loaded again"
            )


def refuse_data(name: str, data: Any) -> None:
    """Raise ValueError for a data set, or a dict of them, that is empty or has no responses."""
    if isinstance(data, Mapping):
        for split, part in data.items():
            refuse_data(f"{name}[{split!r}]", part)
    elif isinstance(data, Dataset):
        missing = [column for column in ("chosen", "rejected") if column not in data.column_names]
        if missing:
            raise ValueError(f"{name} has no column {' and no '.join(missing)}; its columns are {data.column_names}")
        if len(data) == 0:
            raise ValueError(f"{name} is empty")


def refuse_fsdp(args: DPOConfig, plugin: Any) -> None:
    """Raise ValueError for what cannot be done under FSDP, with the reason."""
    if plugin.fsdp_version != 2:
        raise ValueError(f"FusedDPOTrainer runs with FSDP2, got fsdp_version {plugin.fsdp_version}")
    if getattr(args, "spo_inner_steps", 0):
        raise ValueError("spo_inner_steps changes the model's weights, which FSDP shards; use DDP")
    if getattr(args, "tokens_per_batch", None):
        raise ValueError(
            "tokens_per_batch leaves processes with different numbers of forwards, which FSDP joins; use DDP"
        )


def _check_tokens_per_batch(args: DPOConfig, objective: Objective) -> None:
    tokens = getattr(args, "tokens_per_batch", None)
    if tokens is None:
        return
    TokenBudget(tokens)
    reason = why_not_split(args, objective)
    if reason is not None:
        raise ValueError(f"tokens_per_batch {reason}")


def why_not_split(args: DPOConfig, objective: Objective) -> str | None:
    """Why a batch cannot be computed in several forwards, each of some pairs; None where it can."""
    if coupling_of(objective) == "batch":
        return (
            f"makes forwards of different numbers of pairs, and {objective!r} depends on which pairs are in a forward "
            "together: leave one of them out"
        )
    if getattr(args, "spo_inner_steps", 0):
        return (
            "makes forwards of different numbers of pairs, and spo_inner_steps takes steps on the pairs of a forward: "
            "leave one of them out"
        )
    if args.deepspeed_plugin is not None or args.fsdp or args.n_gpu > 1:
        return (
            "leaves processes with different numbers of forwards, which FSDP, DeepSpeed and DataParallel do not take; "
            "use DDP"
        )
    return None


@dataclass(frozen=True)
class WithColumns:
    """A collator whose batches also hold columns of numbers, `[B]` float32 each.

    Raises:
        ValueError: The data has no such column.
    """

    collator: Any
    columns: Sequence[str]
    dataset: Any

    def __post_init__(self) -> None:
        # a stream may not know its columns
        there = getattr(self.dataset, "column_names", None) or self.columns
        missing = [name for name in self.columns if name not in there]
        if missing:
            raise ValueError(
                f"the objective reads {', '.join(missing)} of each pair: train_dataset needs a column of numbers of "
                f"that name; it has {', '.join(there)}"
            )

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The collator's batch and the columns."""
        numbers = {name: torch.tensor([_number(name, record) for record in records]) for name in self.columns}
        return {**self.collator(records), **numbers}


def _number(name: str, record: Mapping[str, Any]) -> float:
    try:
        return float(record[name])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"column {name!r}, which the objective reads, must hold numbers, got {record[name]!r}"
        ) from error
