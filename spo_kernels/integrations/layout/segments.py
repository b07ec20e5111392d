"""A model's own attention, called once for each segment of a row with the keys that the segment may see."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from spo_kernels.integrations.layout.masks import Reach, additive, is_table, read_table

_PREFIX = "spo_segments|"


def attend_by_segments(config: Any) -> None:
    """Let the attention of the models of a transformers configuration read a `segment_table`.

    With any other mask it stays what it was. It stays for good, since gradient checkpointing calls it again in the
    backward. Not saved with the model.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    text = config.get_text_config()
    own = text._attn_implementation
    if own is None or own.startswith(_PREFIX):
        return
    name = _PREFIX + own
    AttentionInterface.register(name, partial(_attention, own))
    if own in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    text._attn_implementation = name


def attend_as_before(config: Any) -> None:
    """Undo `attend_by_segments`."""
    text = config.get_text_config()
    if text._attn_implementation is not None:
        text._attn_implementation = text._attn_implementation.removeprefix(_PREFIX)


def _attention(
    own: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers calls it: query, key and value `[1, heads, N, d]`; returns `[1, N, heads, d]`."""
    source: Any = sys.modules[type(module).__module__]
    # what the module would have called itself
    call = source.ALL_ATTENTION_FUNCTIONS.get_interface(own, getattr(source, "eager_attention_forward", None))
    if not is_table(attention_mask):
        return call(module, query, key, value, attention_mask, **options)
    reach, segments = read_table(cast(Tensor, attention_mask))
    # of the whole row: flash attention would look for sequences in them
    options.pop("position_ids", None)
    lengths = [segment.length for segment in segments]
    # split, not slices: their backward would write a whole row of zeros for each
    queries, keys, values = (each.split(lengths, dim=2) for each in (query, key, value))
    found = []
    for number, segment in enumerate(segments):
        k, v = keys[number], values[number]
        if segment.prefix:
            k, v = (
                torch.cat([each[segment.trunk][:, :, : segment.prefix], each[number]], 2) for each in (keys, values)
            )
        mask = _mask(own, reach, segment.length, segment.prefix, query)
        found.append(call(module, queries[number], k, v, mask, **options)[0])
    return torch.cat(found, 1), None


def _mask(own: str, reach: Reach, length: int, prefix: int, query: Tensor) -> Tensor | None:
    """`[1, 1, length, prefix + length]` additive; None where the kernel's own causal mask is that."""
    if "flash" in own:
        # aligned to the last key, windows too
        return None
    if own == "sdpa" and not prefix and length > 1 and reach.is_causal(length):
        return None
    positions = torch.arange(prefix + length, device=query.device)
    return additive(reach.sees(positions[prefix:], positions), query.dtype)[None, None]
