"""A model's own attention, called once for each segment of a row with the keys that the segment may see."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spo_kernels.integrations.layout.masks import Reach, additive, is_table, read_table

_PREFIX = "spo_segments|"
# a mask has a row for each token: longer segments take several
_BLOCK_BYTES = 16 << 20


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


def own_attention(config: Any) -> str | None:
    """The name of the model's attention, whether it reads a `segment_table` or not."""
    own = config.get_text_config()._attn_implementation
    return None if own is None else str(own).removeprefix(_PREFIX)


def attend_as_before(config: Any) -> None:
    """Undo `attend_by_segments`."""
    config.get_text_config()._attn_implementation = own_attention(config)


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

    def attended(number: int, part: range, q: Tensor, k: Tensor, v: Tensor, *trunk: Tensor) -> Tensor:
        """Some tokens of a segment, with its q, k and v, and where it continues another, k and v of that."""
        length, _, prefix = segments[number]
        if len(part) < length:
            q, k, v = q[:, :, part.start : part.stop], k[:, :, : part.stop], v[:, :, : part.stop]
        if trunk:
            k, v = (torch.cat([t[:, :, :prefix], e], 2) for t, e in zip(trunk, (k, v), strict=True))
        mask = _mask(reach, part, prefix, query) if _is_masked(own, reach, length, prefix) else None
        return cast(Tensor, call(module, q, k, v, mask, **options)[0])

    # in the backward computed again, not kept: the prefix beside each response, and masks
    random = bool(options.get("dropout"))
    again = partial(checkpoint, attended, use_reentrant=False, preserve_rng_state=random)
    found = []
    for number, (length, trunk, prefix) in enumerate(segments):
        mine = [queries[number], keys[number], values[number]]
        mine += [keys[trunk], values[trunk]] if prefix else []
        rows = length
        if _is_masked(own, reach, length, prefix):
            rows = max(1, _BLOCK_BYTES // ((prefix + length) * query.dtype.itemsize))
        attend = again if torch.is_grad_enabled() and (prefix or rows < length) else attended
        for start in range(0, length, rows):
            found.append(attend(number, range(start, min(start + rows, length)), *mine))
    return torch.cat(found, 1), None


def _is_masked(own: str, reach: Reach, length: int, prefix: int) -> bool:
    """Whether a segment needs a mask: the kernel's own causal one is not what it may see."""
    # flash attention's is aligned to the last key, windows too
    return "flash" not in own and not (own == "sdpa" and not prefix and length > 1 and reach.is_causal(length))


def _mask(reach: Reach, part: range, prefix: int, query: Tensor) -> Tensor:
    """`[1, 1, len(part), prefix + part.stop]` additive."""
    positions = torch.arange(prefix + part.stop, device=query.device)
    return additive(reach.sees(positions[prefix + part.start :, None], positions), query.dtype)[None, None]
