"""What each token of a row may attend to, by its segment and its position, in the form that a model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spo_kernels.integrations.layout.rows import PairRow, Segment

# a dense mask has N * N numbers
MASK_BYTES = 64 << 20


@dataclass(frozen=True)
class Reach:
    """How far back the tokens of a layer see within their sequence, by differences of positions."""

    window: int = 0  # 0: no limit
    chunk: int = 0  # 0: none

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether queries at these positions `[q]` see keys at those `[k]`: bool `[q, k]`."""
        queries, keys = queries[:, None], keys[None]
        seen = keys <= queries
        if self.window:
            seen &= queries - keys < self.window
        if self.chunk:
            seen &= queries // self.chunk == keys // self.chunk
        return seen

    def is_causal(self, length: int) -> bool:
        """Whether `length` tokens see all that came before them."""
        return all(limit == 0 or limit >= length for limit in (self.window, self.chunk))


def reaches(config: Any) -> dict[str, Reach]:
    """The reach of each kind of layer of a transformers model, under the kinds' names.

    Raises:
        ValueError: A kind is no attention over single tokens; names it.
    """
    text = config.get_text_config()
    window, chunk = (getattr(text, name, None) or 0 for name in ("sliding_window", "attention_chunk_size"))
    known = {
        "full_attention": Reach(),
        "sliding_attention": Reach(window=window),
        "chunked_attention": Reach(chunk=chunk),
    }
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "chunked_attention" if chunk else "full_attention"]
    unknown = sorted(set(kinds) - set(known))
    if unknown:
        raise ValueError(f"its layers are of kind {', '.join(unknown)}, which carries a state along the row")
    return {kind: known[kind] for kind in dict.fromkeys(kinds)}


def in_the_models_form(config: Any, mask_of: Callable[[Reach], Tensor]) -> Tensor | dict[str, Tensor]:
    """One mask `[1, 1, ...]` where all layers have the same reach, else one for each kind of layer."""
    by_kind = reaches(config)
    made = {reach: mask_of(reach) for reach in by_kind.values()}
    if len(made) == 1:
        return next(iter(made.values()))
    return {kind: made[reach] for kind, reach in by_kind.items()}


def dense_mask(row: PairRow, reach: Reach, dtype: torch.dtype) -> Tensor:
    """`[1, 1, N, N]`: 0 where a token attends to another, else the dtype's least number."""
    device = row.position_ids.device
    lengths, trunks, prefixes = torch.tensor(row.segments, device=device).T
    segment = torch.arange(len(row.segments), device=device).repeat_interleave(lengths)
    positions = row.position_ids[0]
    own = segment[:, None] == segment
    of_prefix = (segment == trunks[segment][:, None]) & (positions < prefixes[segment][:, None])
    return additive((own | of_prefix) & reach.sees(positions, positions), dtype)[None, None]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True, else the dtype's least number."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def segment_table(segments: Sequence[Segment], reach: Reach) -> Tensor:
    """`[1, 1, S + 1, 3]` int64: what `spo_kernels.integrations.layout.segments` makes masks of, segment by segment.

    A model hands it to its layers untouched, as it does any 4-D mask; checkpointing keeps it with the layer.
    """
    return torch.tensor([(reach.window, reach.chunk, 0), *segments])[None, None]


def read_table(table: Tensor) -> tuple[Reach, list[Segment]]:
    """What `segment_table` was made of."""
    (window, chunk, _), *segments = table[0, 0].tolist()
    return Reach(window, chunk), [Segment(*one) for one in segments]


def is_table(mask: Tensor | None) -> bool:
    """Whether a layer's mask is a `segment_table`."""
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype == torch.int64
