"""Where the tokens that count lie in hidden, and where their results go back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.backends.products import Products
from spo_kernels.engine.tokens import Tokens


@dataclass(frozen=True)
class TokenRows:
    """The tokens that count: `rows` index hidden (None: all of it, in order), `labels` are their targets.

    With `mask`, tokens where it is False are among them: they read and write zeros.
    """

    rows: Tensor | None
    labels: Tensor  # [n]
    mask: Tensor | None = None  # [n], bool
    places: Tensor | None = None  # flat places in labels, where values come from and results go; None: as labels lie

    @classmethod
    def of(cls, tokens: Tokens, shift: bool, first: int = 0) -> TokenRows:
        """The tokens that predict the labels that count; classes are counted from `first`."""
        # tiles take a contiguous vector, and flatten() leaves a strided one as it is
        flat, count = tokens.labels.flatten().contiguous(), int(tokens.total)
        flat = flat - first if first else flat
        if not tokens.listed:
            # a permutation, so that each row is written once: the labels that wrap around do not count
            rows = torch.arange(count, device=flat.device).roll(1) if shift else None
            mask = tokens.counted.flatten()
            return cls(rows, flat.masked_fill(~mask, 0), mask)
        if count == flat.numel():
            return cls(None, flat)
        places = tokens.positions[:count]
        return cls(places - 1 if shift else places, flat[places], places=places)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.labels.numel()

    @property
    def fills(self) -> bool:
        """Whether together they write every row of hidden."""
        return self.rows is None or self.mask is not None

    def part(self, start: int, stop: int) -> TokenRows:
        """The tokens start..stop, listed."""
        rows = torch.arange(start, stop, device=self.labels.device) if self.rows is None else self.rows[start:stop]
        return TokenRows(rows, self.labels[start:stop], None if self.mask is None else self.mask[start:stop])

    def take(self, hidden: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Hidden states of tokens start..stop in the dtype of the products."""
        if self.rows is None:
            chosen = hidden if stop - start == len(hidden) else hidden[start:stop]
        else:
            chosen = hidden[self.rows if stop - start == self.count else self.rows[start:stop]]
        return self._masked(chosen, start, stop).to(dtype)

    def operand(self, hidden: Tensor, part: slice | Tensor, products: Products) -> tuple[Tensor, Tensor | None]:
        """Hidden states of some tokens as products take them: copied, or `hidden` and the list of its rows."""
        dtype = products.operand_dtype(hidden)
        if isinstance(part, slice):
            return self.take(hidden, part.start, part.stop, dtype), None
        rows = part if self.rows is None else self.rows[part]
        return (hidden, rows) if products.reads_row_lists(hidden) else (hidden[rows].to(dtype), None)

    def put(self, out: Tensor, start: int, stop: int, values: Tensor) -> None:
        """Write per-token rows to where `take` reads them."""
        values = self._masked(values, start, stop)
        if self.rows is None:
            out[start:stop] = values
        else:
            out[self.rows[start:stop]] = values.to(out.dtype)

    def gather(self, values: Tensor) -> Tensor:
        """Per-label values of the tokens, `[n]`."""
        flat = values.reshape(-1)
        if self.mask is not None:
            return self.masked(flat)
        # an expanded gradient, as sum() sends it, has stride 0
        return flat.contiguous() if self.places is None else flat[self.places]

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Per-token values back at their labels' places, zero elsewhere."""
        if self.mask is not None:
            return self.masked(values).view(shape)
        if self.places is None:
            return values.view(shape)
        out = values.new_zeros(shape)
        out.view(-1)[self.places] = values
        return out

    def masked(self, values: Tensor) -> Tensor:
        """Per-token values `[n]`, 0 where a token does not count."""
        return values if self.mask is None else values.masked_fill(~self.mask, 0)

    def _masked(self, values: Tensor, start: int, stop: int) -> Tensor:
        return values if self.mask is None else values.masked_fill(~self.mask[start:stop, None], 0.0)
