"""What a saved model does on held-out problems, computed from its own logits: a check on the fused training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from arithmetic.answers import batches, write_solutions
from arithmetic.task import Problem, Record, is_right


@dataclass(frozen=True)
class Scores:
    """Means over the held-out problems; log-probs in nats."""

    right_greedy: float  # share of right answers, most likely token at each place
    right_sampled: float  # the same, tokens drawn from the model's distribution
    chosen: float  # log-prob of the right solution
    rejected: float  # log-prob of the wrong solution
    chosen_per_token: float
    rejected_per_token: float
    preferred: float  # share of pairs whose right solution is the more likely one

    @property
    def margin(self) -> float:
        return self.chosen - self.rejected


@torch.no_grad()
def evaluate(folder: Path, problems: Sequence[Problem], pairs: Sequence[Record], seed: int) -> Scores:
    """Scores of the model in ``folder``; ``pairs`` belong to ``problems``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    chosen, chosen_tokens = response_logps(model, tokenizer, pairs, "chosen")
    rejected, rejected_tokens = response_logps(model, tokenizer, pairs, "rejected")
    return Scores(
        right_greedy=answer_accuracy(model, tokenizer, problems, sample=False),
        right_sampled=answer_accuracy(model, tokenizer, problems, sample=True),
        chosen=chosen.mean().item(),
        rejected=rejected.mean().item(),
        chosen_per_token=(chosen.sum() / chosen_tokens.sum()).item(),
        rejected_per_token=(rejected.sum() / rejected_tokens.sum()).item(),
        preferred=(chosen > rejected).double().mean().item(),
    )


def answer_accuracy(model: Any, tokenizer: Any, problems: Sequence[Problem], *, sample: bool) -> float:
    right = 0
    for batch in batches(problems):
        texts = write_solutions(model, tokenizer, batch, sample=sample)
        right += sum(is_right(problem, text) for problem, text in zip(batch, texts, strict=True))
    return right / len(problems)


def response_logps(model: Any, tokenizer: Any, pairs: Sequence[Record], column: str) -> tuple[Tensor, Tensor]:
    """Log-prob [n] and number of tokens [n] of each response, its end-of-sequence token included."""
    logps, lengths = [], []
    for batch in batches(pairs):
        rows = [tokenize(tokenizer, pair["prompt"], pair[column]) for pair in batch]
        input_ids = pad_sequence([ids for ids, _ in rows], batch_first=True)
        counts = pad_sequence([mask for _, mask in rows], batch_first=True)[:, 1:]
        # Padding stands behind the responses, where causal attention does not look.
        log_probs = model(input_ids).logits[:, :-1].float().log_softmax(-1)
        tokens = log_probs.gather(-1, input_ids[:, 1:, None])[..., 0]
        logps.append((tokens * counts).sum(-1))
        lengths.append(counts.sum(-1))
    return torch.cat(logps), torch.cat(lengths)


def tokenize(tokenizer: Any, prompt: str, response: str) -> tuple[Tensor, Tensor]:
    """Token ids of a sequence, and 1 where they count as response."""
    prompt_ids, ids = tokenizer([prompt, response])["input_ids"]
    ids = [*ids, tokenizer.eos_token_id]
    return torch.tensor(prompt_ids + ids), torch.tensor([0] * len(prompt_ids) + [1] * len(ids))
