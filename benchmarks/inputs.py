"""Inputs: peaked ones for accuracy (labels drawn from the model's own distribution) and plain random ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .settings import Setting

LOGIT_STD = 4.0  # spread of the logits: mean log p near -4 at V = 32768, as a language model's
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
    hidden, weight = random_hidden_weight(setting)
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
