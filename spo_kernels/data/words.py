"""Ids of texts, put together from those of their words, which have nearly all been seen before.

Most tokenizers split a text at single spaces before anything else: then the ids of "a cat" are those of "a" and of
" cat", and looking them up is several times faster than encoding. That a tokenizer is of this kind is shown three ways:
no token of it reaches across such a place, none of its added tokens looks at its surroundings, and the first texts,
encoded as a whole too, have the same ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

# Before a space that stands alone between two visible ASCII characters.
_PLACE = re.compile(r"(?= [!-~])(?<=[!-~])")
# The same inside a token, as byte-level tokenizers and SentencePiece write the space, or at its end.
_CROSSED = re.compile(r"[!-~][Ġ▁ ](?:[!-~]|$)")
# Texts that are encoded both ways.
_COMPARED = 1000
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

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens around it."""
        if not self._apart:
            return self._encode(texts)
        together = self._together(texts)
        if self._left_to_compare > 0:
            self._left_to_compare -= len(texts)
            whole = self._encode(texts)
            self._apart = together == whole
            return whole
        return together

    def _together(self, texts: Sequence[str]) -> list[list[int]]:
        words = [_PLACE.split(text) for text in texts]
        if self._characters > _KEPT:
            self._known, self._characters = {}, 0
        new = list(set(chain.from_iterable(words)).difference(self._known))
        self._known.update(zip(new, self._encode(new), strict=True))
        self._characters += sum(map(len, new))
        known = self._known.__getitem__
        return [list(chain.from_iterable(map(known, parts))) for parts in words]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        # Without offsets and masks, half the time of the tokenizer's own call.
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def _splits_at_spaces(backend: Any) -> bool:
    added = backend.get_added_tokens_decoder().values()
    if any(token.rstrip or token.single_word or _PLACE.search(token.content) for token in added):
        return False
    learnt = backend.get_vocab(with_added_tokens=True).keys() - {token.content for token in added}
    return not any(_CROSSED.search(token) for token in learnt)
