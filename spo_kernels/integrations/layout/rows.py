"""A padded batch of pairs as one row without padding, in which responses share their prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Segment(NamedTuple):
    """Consecutive tokens of one sequence: all of it, or what follows the tokens that it shares with a trunk."""

    length: int
    trunk: int  # the segment, before this one, that begins the sequence
    prefix: int  # of whose tokens it continues; 0: none, the sequence begins here


@dataclass(frozen=True)
class PairRow:
    """B pairs laid end to end in one row of N tokens, and where their n scored labels are predicted in it.

    A token whose hidden state predicts no scored label is not laid: neither padding, nor a response's last token.
    """

    input_ids: Tensor  # [1, N]
    position_ids: Tensor  # [1, N], of each token in its own sequence
    segments: tuple[Segment, ...]
    # on the device of the labels, which may be another than the tokens'
    index: Tensor  # [n] the tokens that predict the labels; one may predict a label of several sequences
    labels: Tensor  # [n], B chosen sequences, then B rejected ones
    cu_seqlens: Tensor  # [2B + 1] their bounds
    places: Tensor  # [n] flat places of the labels in the padded batch
    behind_padding: bool = False  # a sequence begins after the first column of the padded batch

    def of_tokens(self, values: Tensor) -> Tensor:
        """Values in the padded labels' shape, as `labels` lie."""
        return values.flatten()[self.places.to(values.device)]

    def padded(self, values: Tensor, like: Tensor) -> Tensor:
        """Values of `labels` in the padded shape, that of `like`; 0 elsewhere."""
        return values.new_zeros(like.numel()).index_copy(0, self.places, values).view(like.shape)


class _Sequence(NamedTuple):
    tokens: np.ndarray  # that are laid
    prompt: bytes  # those before its first scored label
    scored: np.ndarray  # numbers of its scored tokens, each predicted by the one before
    targets: np.ndarray
    places: np.ndarray


class _Laid(NamedTuple):
    """What was laid so far."""

    tokens: list[np.ndarray]
    positions: list[np.ndarray]
    segments: list[Segment]
    predictors: list[np.ndarray]  # of each sequence


def lay_row(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, *, shared: bool, ignore_index: int = -100
) -> PairRow | None:
    """Lay the rows of a padded batch end to end; None where nothing is scored, or a mask has gaps.

    Padding may stand on any side; positions count from each sequence's first token that the mask keeps. A label of
    that token is predicted by nothing and does not count. Waits for a device once.

    Args:
        input_ids: `[2B, T]` int64, chosen rows first.
        labels: `[2B, T]` int64, not shifted, as transformers and TRL have them.
        attention_mask: `[2B, T]`, nonzero where a token counts; None: everywhere.
        shared: Lay the tokens that a sequence has in common with the first one of the same prompt once for both.
        ignore_index: The label that is not scored.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    ids, kept, targets = torch.stack([input_ids, mask, labels.to(input_ids)]).cpu().numpy()
    kept = kept != 0
    begun = kept & np.diff(kept, axis=1, prepend=False)
    if (begun.sum(1) > 1).any():
        # the model counts the masked places between two tokens, a row would not
        return None
    sequences = list(_sequences(ids, kept, targets, ignore_index))
    count = sum(len(one.scored) for one in sequences)
    if not count:
        return None
    laid = _Laid([], [], [], [np.zeros(0, np.int64)] * len(sequences))
    for group in _groups(sequences, shared):
        _lay(sequences, group, laid)
    labels_of, places = [one.targets for one in sequences], [one.places for one in sequences]
    if count == len(sequences):
        # as many labels as sequences: log-probabilities of tokens would be taken for sums; one more, that is not scored
        labels_of[-1], places[-1] = np.append(labels_of[-1], ignore_index), np.append(places[-1], 0)
        laid.predictors[-1] = np.append(laid.predictors[-1], 0)

    def tensor(parts: list[np.ndarray], beside: Tensor = labels) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(beside.device)

    return PairRow(
        input_ids=tensor(laid.tokens, input_ids)[None],
        position_ids=tensor(laid.positions, input_ids)[None],
        segments=tuple(laid.segments),
        index=tensor(laid.predictors),
        labels=tensor(labels_of),
        cu_seqlens=tensor([np.zeros(1), np.cumsum([len(one) for one in labels_of])]),
        places=tensor(places),
        behind_padding=bool((kept.argmax(1) > 0).any()) if kept.size else False,
    )


def _sequences(ids: np.ndarray, kept: np.ndarray, labels: np.ndarray, ignore_index: int) -> Iterator[_Sequence]:
    width = ids.shape[1]
    for row in range(len(ids)):
        columns = kept[row].nonzero()[0]
        tokens, targets = ids[row, columns], labels[row, columns]
        scored = (targets[1:] != ignore_index).nonzero()[0] + 1
        first, last = (scored[0], scored[-1]) if len(scored) else (0, 0)
        yield _Sequence(tokens[:last], tokens[:first].tobytes(), scored, targets[scored], row * width + columns[scored])


def _groups(sequences: list[_Sequence], shared: bool) -> list[list[int]]:
    """Numbers of the sequences that have tokens, those of the same prompt together."""
    groups: dict[bytes | int, list[int]] = {}
    for number, one in enumerate(sequences):
        if len(one.tokens):
            groups.setdefault(one.prompt if shared else number, []).append(number)
    return list(groups.values())


def _lay(sequences: list[_Sequence], group: list[int], laid: _Laid) -> None:
    """Lay sequences of which the later ones continue the first."""
    trunk, trunk_segment = sequences[group[0]].tokens, len(laid.segments)
    start = trunk_start = sum(map(len, laid.tokens))
    for number in group:
        tokens = sequences[number].tokens
        prefix = 0 if number == group[0] else _common(trunk, tokens)
        predictors = sequences[number].scored - 1
        laid.predictors[number] = np.where(predictors < prefix, trunk_start, start - prefix) + predictors
        if prefix < len(tokens):
            length = len(tokens) - prefix
            laid.segments.append(Segment(length, trunk_segment if prefix else len(laid.segments), prefix))
            laid.tokens.append(tokens[prefix:])
            laid.positions.append(np.arange(prefix, len(tokens)))
            start += length


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(len(first), len(second))
    differing = (first[:length] != second[:length]).nonzero()[0]
    return int(differing[0]) if len(differing) else length
