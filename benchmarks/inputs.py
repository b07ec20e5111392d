"""Inputs: peaked ones for accuracy (labels drawn from the model's own distribution) and plain random ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .settings import Setting

LOGIT_STD = 4.0  # spread of the logits: mean log p near -4 at V = 32768, as a language model's
FLAT_STD = 1.0
CHUNK_BYTES = 64 << 20  # one tile of logits while labels are drawn


@dataclass
class Problem:
    """The tensors of one call; `hidden` (and `weight`, unless the head is frozen) require gradients."""

    setting: Setting
    hidden: Tensor  # [2B, T, H], chosen rows first
    weight: Tensor  # [V, H]
    labels: Tensor  # [2B, T]
    workspace_bytes: int | None = None

    def clear(self) -> None:
        self.hidden.grad = None
        self.weight.grad = None


def hidden_weight(setting: Setting) -> tuple[Tensor, Tensor]:
    """Hidden states and head that give the setting's kind of logits."""
    if setting.logits == "lm":
        return lm_hidden_weight(setting)
    return random_hidden_weight(setting, FLAT_STD if setting.logits == "flat" else LOGIT_STD)


def lm_hidden_weight(setting: Setting, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Logits like a language model's: a prior that falls with the token's id, and a few tokens that stand out.

    `logit_v = -2.2 log(1 + v / 300) + Σ_k c_k <W_v, W_id_k>`, rows of W random with norm 1, 60 ids drawn log-uniformly
    (so that low ids, which tokenizers give to frequent tokens, come often), `c_k = 9.7 - log k`. At V = 32768 and
    H = 1024: 58 entries of the softmax above 2^-12 and 2.7 % of the mass below, on average.
    """
    torch.manual_seed(setting.seed)
    tokens, vocab, width = 2 * setting.pairs * setting.tokens, setting.vocab, setting.hidden
    weight = torch.randn(vocab, width, device=device) * width**-0.5
    weight[:, 0] = -2.2 * torch.log1p(torch.arange(vocab, device=device) / 300.0)
    hidden = torch.zeros(tokens, width, device=device)
    for rank in range(1, 61):
        drawn = 300.0 * (vocab / 300.0) ** torch.rand(tokens, device=device) - 300.0
        hidden += (9.7 - math.log(rank)) * weight[drawn.long().clamp(0, vocab - 1)]
    hidden[:, 0] = 1.0
    dtype = setting.torch_dtype
    return hidden.view(2 * setting.pairs, setting.tokens, width).to(dtype), weight.to(dtype)


@torch.no_grad()
def concentration(problem: Problem) -> dict[str, float]:
    """Entries of the softmax above 2^-12 and the mass below, means over (at most 256) tokens."""
    few = problem.hidden.flatten(0, 1)[:: max(1, problem.setting.rows // 256)].float()
    p = (few @ problem.weight.float().t()).softmax(-1)
    above = p > 2.0**-12
    return {
        "entries_above_2^-12": above.sum(1).double().mean().item(),
        "mass_below_2^-12": (p * ~above).sum(1).double().mean().item(),
    }


def random_hidden_weight(setting: Setting, logit_std: float = LOGIT_STD) -> tuple[Tensor, Tensor]:
    """Hidden states of unit variance and a head scaled so that logits have that standard deviation."""
    torch.manual_seed(setting.seed)
    dtype = setting.torch_dtype
    hidden = torch.empty(2 * setting.pairs, setting.tokens, setting.hidden, dtype=dtype).normal_()
    weight = torch.empty(setting.vocab, setting.hidden, dtype=dtype)
    weight.normal_(std=logit_std * setting.hidden**-0.5)
    return hidden, weight


def random_problem(setting: Setting, logit_std: float = LOGIT_STD) -> Problem:
    """Inputs with uniform labels: no product is needed to make them, so they serve at any length."""
    hidden, weight = random_hidden_weight(setting, logit_std)
    labels = torch.randint(setting.vocab, hidden.shape[:2])
    return as_problem(setting, hidden, weight, labels)


def peaked_problem(setting: Setting) -> Problem:
    """Inputs whose labels are drawn from softmax(hidden @ weight.T), with pair margins near zero."""
    hidden, weight = hidden_weight(setting)
    draws, logps = draw_labels(hidden.flatten(0, 1), weight)
    shape = (2 * setting.pairs, setting.tokens, 2)
    labels = balance_pairs(draws.view(shape), logps.view(shape))
    return as_problem(setting, hidden, weight, labels)


def as_problem(setting: Setting, hidden: Tensor, weight: Tensor, labels: Tensor) -> Problem:
    hidden.requires_grad_(True)
    weight.requires_grad_(not setting.frozen)
    return Problem(setting, hidden, weight, labels)


def draw_labels(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent labels per row, with their log-probabilities: `[N, 2]` each."""
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    draws, logps = [], []
    head = weight.float().t()
    for chunk in hidden.split(rows):
        log_p = (chunk.float() @ head).log_softmax(-1)
        draw = torch.multinomial(log_p.exp(), 2, replacement=True)
        draws.append(draw)
        logps.append(log_p.gather(-1, draw))
    return torch.cat(draws), torch.cat(logps)


def balance_pairs(draws: Tensor, logps: Tensor) -> Tensor:
    """Labels `[2B, T]`: of a rejected token's two draws, keep the one that holds the pair's margin near zero.

    A margin of +-8, usual for 512 free draws, saturates the sigmoid: relative gradient errors would then
    measure e^-margin instead of the kernel.
    """
    labels = draws[..., 0].clone()
    pairs = draws.shape[0] // 2
    for b in range(pairs):
        margin = 0.0
        for t in range(draws.shape[1]):
            margin += logps[b, t, 0].item()
            first, second = logps[pairs + b, t].tolist()
            pick = int(abs(margin - second) < abs(margin - first))
            labels[pairs + b, t] = draws[pairs + b, t, pick]
            margin -= second if pick else first
    return labels


def save(problem: Problem, path: Path) -> None:
    tensors = {"hidden": problem.hidden, "weight": problem.weight, "labels": problem.labels}
    torch.save({name: tensor.detach() for name, tensor in tensors.items()}, path)


def load(setting: Setting, path: Path) -> Problem:
    tensors = torch.load(path)
    return as_problem(setting, tensors["hidden"], tensors["weight"], tensors["labels"])
