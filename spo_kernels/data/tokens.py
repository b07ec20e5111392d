"""Token ids of prompt + response, encoded jointly.

A tokenizer may insert a space in front of a text, or merge across the end of the prompt. So both texts are encoded as
one, as the model will have seen them in pre-training, and cut where the prompt's own ids end. Where these are not how
the joint ids begin (a token holds the end of the prompt and the beginning of the response), the longest common
beginning is the prompt, and that token belongs to the response.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

from spo_kernels.data.common import common
from spo_kernels.data.template import Span
from spo_kernels.data.words import Words

# A text longer than this many characters a token is first encoded in part.
_CHARACTERS_PER_TOKEN = 8


class Tokens:
    """A tokenizer, with what is the same for all texts worked out once; ids beyond `limit` are not wanted."""

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self.eos: int = tokenizer.eos_token_id
        self.prefix = _special_prefix(tokenizer)
        self.special = {self.eos, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
        self._blank: dict[int, bool] = {}
        self._words = Words(tokenizer.backend_tokenizer) if tokenizer.is_fast else None

    def ids(self, groups: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """The first `limit` ids of the texts of each group, whose first is how the others begin."""
        long = 2 * _CHARACTERS_PER_TOKEN * self._limit
        rest = iter(self._encode([group for group in groups if all(len(text) <= long for text in group)]))
        return [
            next(rest) if all(len(text) <= long for text in group) else [self._long(text) for text in group]
            for group in groups
        ]

    def _long(self, text: str) -> list[int]:
        """As if the whole text were encoded: two of its beginnings, one twice as long, have the same first ids."""
        size = _CHARACTERS_PER_TOKEN * self._limit
        ((ids,),) = self._encode([[text[:size]]])
        while size < len(text):
            size, previous = 2 * size, ids
            ((ids,),) = self._encode([[text[:size]]])
            if len(previous) > self._limit and previous[: self._limit] == ids[: self._limit]:
                break
        return ids[: self._limit]

    def _encode(self, groups: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        if self._words is not None:
            return self._words.ids(groups)
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return [self._tokenizer(list(group), verbose=False, **options)["input_ids"] for group in groups]

    def token_spans(self, text: str, ids: list[int], spans: list[Span]) -> list[Span]:
        """Where `spans` of the text's characters are in its ids; a token on a boundary belongs to the part that it
        begins before the end of, and ends after the beginning of.
        """
        if not self._tokenizer.is_fast:
            places = [[common(ids, part) for part in self._encode([[text[:a], text[:b]]])[0]] for a, b in spans]
            return [(a, b) for a, b in places]
        starts, ends = zip(*self._offsets(text, len(ids)), strict=True)
        found = [(bisect_right(ends, a), bisect_left(starts, b)) for a, b in spans]
        return [(a, min(b, len(ids))) for a, b in found if a < len(ids)]

    def _offsets(self, text: str, n: int) -> list[Span]:
        """The characters of the first n tokens and perhaps more."""
        size = 2 * _CHARACTERS_PER_TOKEN * n
        while True:
            given = self._tokenizer(text[:size], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            if size >= len(text) or len(given["offset_mapping"]) > n:
                return given["offset_mapping"]
            size *= 2

    def end_of_turn(self, ids: list[int]) -> int:
        """Where a turn ends that a chat template has ended: after its last special token; 0 where it has not.

        White space that the template writes after that token is not the turn's: there generation has stopped.
        """
        n = len(ids)
        while n and ids[n - 1] not in self.special and self._is_blank(ids[n - 1]):
            n -= 1
        return n if n and ids[n - 1] in self.special else 0

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]


def _special_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text, such as [BOS]; chat templates write it themselves."""
    bare, full = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    return next((full[:i] for i in range(len(full)) if full[i : i + len(bare)] == bare), [])
