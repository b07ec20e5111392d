"""Accuracy on a real model's hidden states: `python -m benchmarks.real_model --model FOLDER --pairs FILE.jsonl`.

The model reads the chosen responses of preference pairs in float32; its hidden states and head, rounded to bfloat16,
are the inputs of everything that is compared. Errors are against float64 logits of the same inputs: of a token, and of
the sum of 512 consecutive response tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo_kernels import LMHead, linear_logprob
from spo_kernels.data import Encoding, encode, read_records
from spo_kernels.integrations.transformers import hidden_states
from spo_kernels.testing import eager_logprob

from .machine import describe_machine, machine_line

WINDOW = 512


def half_logits(hidden: Tensor, head: LMHead, labels: Tensor) -> Tensor:
    """What a model's own bf16 logits give; the heads that are read here have neither scale nor softcap."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    return logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


WAYS: dict[str, tuple[str, Callable[..., Any]]] = {
    "half_logits": ("bf16 logits, `.float().log_softmax`", half_logits),
    "ours": ("`linear_logprob`", linear_logprob),
}


def inputs(model: Any, tokenizer: Any, pairs: Path, count: int) -> tuple[Tensor, Tensor]:
    """Hidden states `[N, H]` that predict the scored tokens of so many responses, and these tokens `[N]`."""
    examples = encode(read_records(str(pairs)), tokenizer, Encoding(max_length=1024))
    hidden, labels = [], []
    for i in range(min(count, len(examples))):
        example = examples[i]
        ids = torch.tensor([[*map(int, example.prompt), *map(int, example.responses[0])]])
        start = len(example.prompt)
        with torch.no_grad():
            hidden.append(hidden_states(model, input_ids=ids)[0, start - 1 : -1])
        labels.append(ids[0, start:])
    return torch.cat(hidden), torch.cat(labels)


def errors(hidden: Tensor, head: LMHead, labels: Tensor) -> dict[str, dict[str, float]]:
    """Worst token and worst sum of each way, in nats; a shorter last window has no sum."""

    def by_window(function: Callable[..., Any], **options: Any) -> Tensor:
        parts = zip(hidden.split(WINDOW), labels.split(WINDOW), strict=True)
        return torch.cat([function(h, head, y, **options).double() for h, y in parts])

    with torch.no_grad():
        truth = by_window(eager_logprob, dtype=torch.float64)
        off = {name: by_window(function) - truth for name, (_, function) in WAYS.items()}
    whole = len(labels) // WINDOW * WINDOW
    return {
        name: {"token": error.abs().max().item(), "sum": error[:whole].view(-1, WINDOW).sum(1).abs().max().item()}
        for name, error in off.items()
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """The command."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a causal language model")
    parser.add_argument("--pairs", required=True, type=Path, help="file of prompt, chosen and rejected")
    parser.add_argument("--count", type=int, default=24, help="responses (default: 24)")
    parser.add_argument("--name", help="what the model is called (default: as --model)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    options = parser.parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    hidden, labels = inputs(model, AutoTokenizer.from_pretrained(options.model), options.pairs, options.count)
    head = LMHead.of(model)
    half = LMHead(head.weight.detach().bfloat16(), None if head.bias is None else head.bias.detach().bfloat16())
    report = {
        "model": options.name or options.model,
        "tokens": len(labels),
        "vocabulary": len(head.weight),
        "window": WINDOW,
        "machine": describe_machine(0),
        "errors": errors(hidden.bfloat16(), half, labels),
    }
    print(f"{machine_line(report['machine'])}\n{report['tokens']} response tokens, V = {report['vocabulary']}\n")
    print(f"| bf16 inputs | worst token, nat | worst sum of {WINDOW} |\n|---|---|---|")
    for name, (about, _) in WAYS.items():
        found = report["errors"][name]
        print(f"| {about} | {found['token']:.1e} | {found['sum']:.1e} |")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
