"""Each token's logits summed over the vocabulary, while tiles pass that are made anyway."""

from __future__ import annotations

from torch import Tensor

from spo_kernels.backends.contract import Backend, Tile
from spo_kernels.backends.torch_backend import PIECES, pieces, to_logits
from spo_kernels.engine.head_slices import HeadSlices
from spo_kernels.engine.workspace import spans

_TOKENS = 1024


class LogitSums:
    """Sums `[n]`. Without a softcap they are a product with the sum of the head's rows, and no tile is read."""

    def __init__(self, head: HeadSlices, like: Tensor, tokens: int) -> None:
        """Of no token yet; dtype and device are those of `like`."""
        self.values = like.new_zeros(tokens)
        self._head = head
        self._transform = head.transform
        self._row = head.summed_rows(like.dtype) if head.transform.softcap is None else None
        self._bias = None if self._row is None else head.summed_bias(like.dtype)

    @staticmethod
    def temporaries(head: HeadSlices, backend: Backend) -> float | None:
        """What passes over a tile need, for `plan_tiles`."""
        return None if head.transform.softcap is None else max(backend.temporaries, 1 / PIECES)

    def means(self, tokens: int) -> Tensor:
        """Each of the first tokens' logits, averaged over the whole vocabulary."""
        return self._head.sum_(self.values[:tokens] / self._head.classes)

    def begin(self, tokens: slice, states: Tensor) -> None:
        """Tokens whose tiles come next, and their hidden states."""
        out = self.values[tokens]
        if self._row is None:
            out.zero_()
            return
        for part in spans(len(states), _TOKENS):
            out[part] = states[part].to(out.dtype) @ self._row
        if self._bias is not None:
            out += self._bias
        out *= self._transform.scale

    def add(self, tokens: slice, tile: Tile) -> None:
        """A tile of these tokens, before it is written over."""
        if self._row is None:
            out = self.values[tokens]
            for part in pieces(*tile.products.shape):
                out[part] += to_logits(tile.products[part], tile.bias, tile.transform).sum(1)
