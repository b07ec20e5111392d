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
# of flex_attention's
_BLOCK = 128


@dataclass(frozen=True)
class Reach:
    """How far back the tokens of a layer see within their sequence, by differences of positions."""

    window: int = 0  # 0: no limit
    chunk: int = 0  # 0: none

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether queries at these positions see keys at those, broadcast against each other."""
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


def in_the_models_form(config: Any, mask_of: Callable[[Reach], Any]) -> Any:
    """One mask `[1, 1, ...]` where all layers have the same reach, else one for each kind of layer."""
    by_kind = reaches(config)
    made = {reach: mask_of(reach) for reach in by_kind.values()}
    if len(made) == 1:
        return next(iter(made.values()))
    return {kind: made[reach] for kind, reach in by_kind.items()}


def visible(row: PairRow, reach: Reach) -> Callable[[Tensor, Tensor], Tensor]:
    """Whether tokens of the row, by their places in it, attend to others, broadcast against each other."""
    positions = row.position_ids[0]
    lengths, trunks, prefixes = torch.tensor(row.segments, device=positions.device).T
    segment = torch.arange(len(row.segments), device=positions.device).repeat_interleave(lengths)

    def seen(queries: Tensor, keys: Tensor) -> Tensor:
        own, other = segment[queries], segment[keys]
        of_prefix = (other == trunks[own]) & (positions[keys] < prefixes[own])
        return ((own == other) | of_prefix) & reach.sees(positions[queries], positions[keys])

    return seen


def dense_mask(row: PairRow, reach: Reach, dtype: torch.dtype) -> Tensor:
    """`[1, 1, N, N]`: 0 where a token attends to another, else the dtype's least number."""
    places = torch.arange(row.position_ids.shape[1], device=row.position_ids.device)
    return additive(visible(row, reach)(places[:, None], places), dtype)[None, None]


def block_mask(row: PairRow, reach: Reach) -> Any:
    """The same as `flex_attention` takes it: which blocks of queries and keys there is something to see in."""
    from torch.nn.attention.flex_attention import BlockMask

    seen, tokens, device = visible(row, reach), row.position_ids.shape[1], row.position_ids.device
    columns = torch.arange(-(-tokens // _BLOCK) * _BLOCK, device=device)
    last = tokens - 1
    some, every = [], []
    # a block of queries at a time: nothing grows with the square of the row
    for queries in columns.split(_BLOCK):
        part = seen(queries.clamp_max(last)[:, None], columns.clamp_max(last))
        part &= (queries < tokens)[:, None] & (columns < tokens)
        of_blocks = part.view(_BLOCK, -1, _BLOCK)
        some.append(of_blocks.any(2).any(0))
        every.append(of_blocks.all(2).all(0))
    full = torch.stack(every)
    partial, whole = _listed(torch.stack(some) & ~full), _listed(full)
    return BlockMask.from_kv_blocks(
        *partial,
        *whole,
        BLOCK_SIZE=_BLOCK,
        mask_mod=lambda _, __, query, key: seen(query, key),
        seq_lengths=(tokens, tokens),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row how many blocks are set, and their numbers before those of the others."""
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return blocks.sum(-1, dtype=torch.int32)[None, None], numbers[None, None]


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
