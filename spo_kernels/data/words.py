"""Ids of texts, put together from those of their words, which have nearly all been seen before.

Most tokenizers split a text at single spaces before anything else: then the ids of "a cat" are those of "a" and of
" cat", and looking them up is several times faster than encoding. That a tokenizer is of this kind is shown three ways:
no token of it reaches across such a place, none of its added tokens looks at its surroundings, and the first texts,
encoded as a whole too, have the same ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

# Before a space that stands alone between two visible ASCII characters.
_PLACE = re.compile(r"(?= [!-~])(?<=[!-~])")
# The same inside a token, as byte-level tokenizers and SentencePiece write the space, or at its end.
_CROSSED = re.compile(r"[!-~][Ġ▁ ](?:[!-~]|$)")
# Groups of texts that are encoded both ways.
_COMPARED = 300
# Characters of the words that are kept: a few hundred thousand of them.
_KEPT = 1 << 21


class Words:
    """The backend of a fast tokenizer."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        # A saved tokenizer may cut or pad.
        backend.no_truncation()
        backend.no_padding()
        self._known: dict[str, list[int]] = {}
        self._characters = 0
        self._left_to_compare = _COMPARED if _splits_at_spaces(backend) else 0
        self._apart = self._left_to_compare > 0

    def ids(self, groups: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Ids of the texts of each group, whose first is how the others begin, without special tokens around them."""
        if not self._apart:
            return self._encode(groups)
        together = self._together(groups)
        if self._left_to_compare > 0:
            self._left_to_compare -= len(groups)
            whole = self._encode(groups)
            self._apart = together == whole
            return whole
        return together

    def _together(self, groups: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        # Each group's common beginning, up to its last place, and what follows in each text.
        split: list[tuple[list[str], list[list[str]]]] = []
        for first, *others in groups:
            beginning = _PLACE.split(first)
            last = beginning.pop()
            start = len(first) - len(last)
            split.append((beginning, [[last], *(_PLACE.split(text[start:]) for text in others)]))
        self._learn(set(chain.from_iterable(chain(beginning, *rests) for beginning, rests in split)))
        ids = self._known.__getitem__
        encoded = []
        for beginning, rests in split:
            shared = list(chain.from_iterable(map(ids, beginning)))
            encoded.append([[*shared, *chain.from_iterable(map(ids, rest))] for rest in rests])
        return encoded

    def _learn(self, words: set[str]) -> None:
        if self._characters > _KEPT:
            self._known, self._characters = {}, 0
        new = list(words.difference(self._known))
        self._known.update(zip(new, self._encode([new])[0], strict=True))
        self._characters += sum(map(len, new))

    def _encode(self, groups: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        # Without offsets and masks, half the time of the tokenizer's own call.
        texts = list(chain.from_iterable(groups))
        encoded = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        return [[encoding.ids for encoding in islice(encoded, len(group))] for group in groups]


def _splits_at_spaces(backend: Any) -> bool:
    added = backend.get_added_tokens_decoder().values()
    if any(token.rstrip or token.single_word or _PLACE.search(token.content) for token in added):
        return False
    learnt = backend.get_vocab(with_added_tokens=True).keys() - {token.content for token in added}
    return not any(_CROSSED.search(token) for token in learnt)
