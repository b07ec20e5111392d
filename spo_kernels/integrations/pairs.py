"""Batches of preference pairs for a training loop, and the reference's log-probabilities of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from spo_kernels.arguments import check_whole, is_whole
from spo_kernels.extras.token_weights import ld_dpo_weights
from spo_kernels.integrations.at_head import ResponseLogps
from spo_kernels.integrations.hidden import device_of
from spo_kernels.integrations.modes import evaluating

SIDES = ("chosen", "rejected")
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# TRL's names
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class PairCollator:
    """Pads tokenised pairs on the right: a batch for `FusedPreferenceModel`, chosen rows first.

    A record has `prompt_ids`, `chosen_ids` and `rejected_ids` (lists of token ids; the names of `spo_kernels.data` and
    of TRL), and maybe `ref_chosen_logps` and `ref_rejected_logps` (TRL's names), which become `ref_logps`.

    Attributes:
        pad_token_id: Fills `input_ids`.
        max_length: Tokens of a row at most; what is longer is cut at its end. None for no limit.
    """

    pad_token_id: int
    max_length: int | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.pad_token_id):
            raise TypeError(
                f"pad_token_id must be an int, got {self.pad_token_id!r}; where a tokenizer has none, its eos_token_id "
                "does: padding is masked and has no label"
            )
        if self.pad_token_id < 0:
            raise ValueError(f"pad_token_id must be the id of a token, got {self.pad_token_id}")
        if self.max_length is not None:
            check_whole("max_length", self.max_length, 1)

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels `[2B, T]`, and ref_logps `[2B]` where the records have them.

        Raises:
            KeyError: A record lacks a column, or the log-probabilities that others have.
            TypeError: A column holds a text, not token ids.
            ValueError: max_length leaves nothing of a response.
        """
        referenced = any(name in record for record in records for name in REFERENCE)
        for record in records:
            if missing := [name for name in COLUMNS if name not in record]:
                raise KeyError(f"a record lacks {', '.join(missing)} (token ids); it has {', '.join(record)}")
            if missing := [name for name in REFERENCE if referenced and name not in record]:
                raise KeyError(f"a record lacks {', '.join(missing)}, which others have: all records or none")
            if texts := [name for name in COLUMNS if isinstance(record[name], str)]:
                raise TypeError(
                    f"{texts[0]} must be token ids, got the text {record[texts[0]][:40]!r}: tokenise it first"
                )
        prompts = [list(record["prompt_ids"]) for _ in SIDES for record in records]
        responses = [list(record[f"{side}_ids"]) for side in SIDES for record in records]
        longest = max((len(p) for p, r in zip(prompts, responses, strict=True) if r), default=0)
        if self.max_length is not None and longest >= self.max_length:
            raise ValueError(
                f"max_length = {self.max_length} leaves nothing of the response after a prompt of {longest} tokens: "
                "raise it, or leave such records out"
            )
        rows = [(p + r)[: self.max_length] for p, r in zip(prompts, responses, strict=True)]
        labels = [([-100] * len(p) + r)[: self.max_length] for p, r in zip(prompts, responses, strict=True)]
        batch = {
            "input_ids": _padded(rows, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in rows], 0),
            "labels": _padded(labels, -100),
        }
        if referenced:
            batch["ref_logps"] = torch.tensor([float(record[name]) for name in REFERENCE for record in records])
        return batch


def _padded(rows: list[list[int]], value: int) -> Tensor:
    out = torch.full((len(rows), max(map(len, rows), default=0)), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return out


@torch.no_grad()
def precompute_ref_logps(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Tensor]],
    *,
    ld_alpha: float | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The reference's log-probabilities of chosen and rejected responses, `[n, 2]` float32 on the CPU, in order.

    Args:
        model: The reference: a frozen copy, another model, or a PEFT model, whose adapters are switched off.
        dataloader: Batches of `PairCollator` in the order of the records, the same on every process: where
            torch.distributed is initialised, the processes share the batches among them and all get the whole. Each
            calls the model equally often, as a model in parts needs it: of a round that has no batch for a process, it
            computes the last one too.
        ld_alpha: That of the `FusedPreferenceModel` whose calls take the sums: they then have its token weights.
        workspace_bytes, backend: As in `sequence_logps`.

    Raises:
        TypeError, ValueError: The model or a batch is wrong; the message names it.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)
    device, options = device_of(model), {"workspace_bytes": workspace_bytes, "backend": backend}
    adapters_off = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()  # type: ignore[operator]
    found, batches = [], iter(dataloader)
    with evaluating(model), adapters_off:
        while round_ := list(islice(batches, world)):
            batch = round_[min(rank, len(round_) - 1)]
            if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
                raise TypeError(
                    "dataloader must give batches of PairCollator, with input_ids and labels, such as "
                    "DataLoader(records, collate_fn=PairCollator(pad_token_id))"
                )
            inputs = {k: batch[k].to(device) for k in ("input_ids", "attention_mask") if k in batch}
            labels = batch["labels"].to(device)
            weights = None if ld_alpha is None else ld_dpo_weights(labels, ld_alpha, shift=True)
            logps = ResponseLogps(labels, weights, "padded", options)(model, model, inputs)["logps"].float()
            for number, each in enumerate(round_):
                share = logps if number == rank else torch.zeros(len(each["labels"]), device=device)
                found.append(share.view(2, -1).T)
    every = torch.cat(found) if found else torch.zeros(0, 2, device=device)
    if together:
        torch.distributed.all_reduce(every)
    return every.cpu()
