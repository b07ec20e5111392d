"""transformers' Trainer with a fused preference loss; pairs with prompt, chosen and rejected."""

import argparse
from typing import Any

from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from spo_kernels.integrations.transformers import FusedPreferenceModel, PairCollator, precompute_ref_logps


def encode(record: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """Ids of a record; a token that begins texts stands before the prompt alone."""
    ids = {
        k: tokenizer(record[k], add_special_tokens=k == "prompt").input_ids for k in ("prompt", "chosen", "rejected")
    }
    return {f"{k}_ids": v if k == "prompt" else [*v, tokenizer.eos_token_id] for k, v in ids.items()}


def main(name: str, pairs: str, output: str, **settings: float) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    data = load_dataset("json", data_files=pairs, split="train").map(encode, fn_kwargs={"tokenizer": tokenizer})
    collate = PairCollator(tokenizer.pad_token_id, max_length=1024)
    sums = precompute_ref_logps(model, DataLoader(data, batch_size=4, collate_fn=collate))
    for side, column in zip(("chosen", "rejected"), sums.T.tolist(), strict=True):
        data = data.add_column(f"ref_{side}_logps", column)
    arguments = TrainingArguments(output, remove_unused_columns=False, report_to="none", **settings)
    Trainer(FusedPreferenceModel(model, "spo"), arguments, collate, data).train()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.transformers_trainer", description=__doc__)
    parser.add_argument("model", help="a name or a folder")
    parser.add_argument("pairs", help="a file of JSON lines")
    parser.add_argument("output", help="a folder for model and tokenizer")
    given = parser.parse_args()
    main(given.model, given.pairs, given.output)
