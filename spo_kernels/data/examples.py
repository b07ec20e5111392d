"""Encoded records: one at a time, all as a sequence, and a share of the prompts held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import datasets
import numpy as np

from spo_kernels.data.errors import DataError

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Example:
    """Token ids of a sample, int32; responses include the end-of-sequence token unless they were cut.

    Attributes:
        prompt: ids `[P]`.
        responses: ids of (completion,), or of (chosen, rejected).
        inputs: what the loss reads of a pair, by its name for them.
        scored: for each response the parts that count, as (start, end); empty where all of it does.
    """

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    inputs: dict[str, float] = field(default_factory=dict)
    scored: tuple[Spans, ...] = ()

    def spans(self, k: int) -> Spans:
        """The parts of response k that count."""
        return (self.scored[k] if self.scored else ()) or ((0, len(self.responses[k])),)

    def response_length(self, k: int) -> int:
        """Tokens of response k that count."""
        return sum(end - start for start, end in self.spans(k))

    @property
    def response_tokens(self) -> int:
        return sum(self.response_length(k) for k in range(len(self.responses)))

    @property
    def tokens(self) -> int:
        return sum(len(self.prompt) + len(r) for r in self.responses)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the prompt and of each response."""
        return (len(self.prompt), *map(len, self.responses))

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(r) for r in self.responses)


class Examples(Sequence[Example]):
    """Some rows of an encoded data set; a row is read from the memory-mapped file when it is asked for."""

    def __init__(self, dataset: datasets.Dataset, rows: np.ndarray, inputs: tuple[str, ...] = ()) -> None:
        self._whole, self._rows, self._inputs = dataset, rows, inputs
        names = [name for name in ("completion", "chosen", "rejected") if f"{name}_ids" in dataset.column_names]
        column = dataset.data.column
        self._prompt = column("prompt_ids")
        self._responses = [column(f"{name}_ids") for name in names]
        self._scored = [column(f"{name}_scored") for name in names]
        self._values = {name: column(f"input:{name}") for name in inputs}

    @property
    def dataset(self) -> datasets.Dataset:
        """As a data set of `datasets`, with columns prompt_ids, chosen_ids, rejected_ids (or completion_ids)."""
        return self._whole.select(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Examples: ...
    def __getitem__(self, i: int | slice) -> Example | Examples:
        if isinstance(i, slice):
            return Examples(self._whole, self._rows[i], self._inputs)
        row = int(self._rows[i])
        scored = tuple(_pairs(column[row].as_py()) for column in self._scored)
        return Example(
            _ids(self._prompt, row),
            tuple(_ids(column, row) for column in self._responses),
            {name: column[row].as_py() for name, column in self._values.items()},
            scored if any(scored) else (),
        )

    def hold_out(self, fraction: float, seed: int) -> tuple[Examples, Examples]:
        """(rest, held out): a share of the *prompts*, all records of a prompt on the same side.

        A random split of rows would put one prompt's pairs on both sides and measure memory.
        """
        keys = self._whole.data.column("key").to_numpy()
        chosen = held_out_prompts(keys, fraction, seed)[self._rows]
        if chosen.all() or not chosen.any():
            prompts, n = len(np.unique(keys)), int(chosen.sum())
            raise DataError(
                f"--eval-fraction {fraction} of {prompts} different prompts leaves {len(self) - n} records "
                f"to train on and {n} to evaluate on"
            )
        sides = (self._rows[~chosen], self._rows[chosen])
        rest, out = (Examples(self._whole, rows, self._inputs) for rows in sides)
        return rest, out


def held_out_prompts(keys: Sequence[Any] | np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Whether each record is held out, bool `[records]`: a random share of the different keys is."""
    _, first, inverse = np.unique(np.asarray(keys), return_index=True, return_inverse=True)
    # Prompts are numbered as they appear.
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    order = np.random.default_rng(seed).permutation(len(first))
    held_out = np.zeros(len(first), dtype=bool)
    held_out[order[: round(fraction * len(first))]] = True
    return held_out[number[inverse]]


def _ids(column: Any, row: int) -> np.ndarray:
    return column[row].values.to_numpy()


def _pairs(flat: list[int]) -> Spans:
    return tuple(zip(flat[::2], flat[1::2], strict=True))
