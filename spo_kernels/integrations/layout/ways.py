"""Which way a model can take a row without padding, found once by comparing it with the plain layout."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from spo_kernels.engine.checks import without_autocast
from spo_kernels.head import inner_model
from spo_kernels.integrations.hidden import Run, device_of, forward_without_logits
from spo_kernels.integrations.layout.masks import (
    MASK_BYTES,
    block_mask,
    dense_mask,
    in_the_models_form,
    reaches,
    segment_table,
)
from spo_kernels.integrations.layout.rows import PairRow, lay_row
from spo_kernels.integrations.layout.segments import attend_as_before, attend_by_segments, own_attention
from spo_kernels.integrations.modes import evaluating

# relative difference of a token's hidden states that counts as rounding
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_ROUNDING_OF_HALVES = 5e-2
# a window so small that the check's sequences are longer
_WINDOW = 4
_RECURRENT = "it carries a state along the row (recurrent, Mamba, linear attention), which would cross sequences"
_ALIBI = "its ALiBi biases count places in the row and ignore position_ids"


class NotExact(Exception):
    """A model cannot take rows without padding; the message says why."""


Masks = Callable[[Any, PairRow, torch.dtype], Any]


def by_segments(config: Any, row: PairRow, dtype: torch.dtype) -> Any:
    """Masks for a model whose attention transformers dispatches: no number for each pair of tokens."""
    attend_by_segments(config)
    return in_the_models_form(config, lambda reach: segment_table(row.segments, reach))


def by_block_masks(config: Any, row: PairRow, dtype: torch.dtype) -> Any:
    """Masks for a model whose attention is `flex_attention`: one kernel for all segments."""
    attend_as_before(config)
    return in_the_models_form(config, lambda reach: block_mask(row, reach))


def by_dense_masks(config: Any, row: PairRow, dtype: torch.dtype) -> Any:
    """Masks for a model with an attention of its own.

    Raises:
        NotExact: A mask would take more than MASK_BYTES.
    """
    attend_as_before(config)
    tokens = row.input_ids.numel()
    if tokens * tokens * dtype.itemsize > MASK_BYTES:
        raise NotExact(f"a mask of {tokens} x {tokens} tokens takes more than {MASK_BYTES >> 20} MiB")
    return in_the_models_form(config, lambda reach: dense_mask(row, reach, dtype))


_found: WeakKeyDictionary[nn.Module, Masks | str] = WeakKeyDictionary()
# of those, the models whose hidden states change where padding stands in front
_count_padding: WeakSet[nn.Module] = WeakSet()


def way_of(model: nn.Module, run: Run | None = None) -> Masks:
    """How the model takes masks of a row, compared with the plain layout when it is first asked for.

    `run` as in `forward_to_head`.

    Raises:
        NotExact: No way gives the plain layout's hidden states, or one of them is known not to.
    """
    inner = inner_model(model)
    reason = _named(model, inner)
    if reason:
        raise NotExact(reason)
    if inner not in _found:
        _found[inner] = _compare(model, inner, run)
    way = _found[inner]
    if isinstance(way, str):
        raise NotExact(way)
    return way


def inputs_of(model: nn.Module, row: PairRow, way: Masks) -> dict[str, Any]:
    """What the model's forward takes for the row.

    Raises:
        NotExact: This row is too long for the model's way, or its sequences have other positions in the padded batch.
    """
    inner = inner_model(model)
    if row.behind_padding and inner in _count_padding:
        attend_as_before(inner.config)
        raise NotExact("its positions count padding in front of a sequence: pad on the right, or pass position_ids")
    mask = way(inner.config, row, next(model.parameters()).dtype)
    return {"input_ids": row.input_ids, "attention_mask": mask, "position_ids": row.position_ids}


def _named(model: nn.Module, inner: Any) -> str | None:
    """Why a model of a known family cannot take such rows."""
    config = inner.config.get_text_config()
    kind = config.model_type
    while not hasattr(model, "peft_config") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    adapters: Any = getattr(model, "peft_config", None) or {}
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        return "its adapter adds virtual tokens (prompt, prefix or p-tuning) in front of a row, not of each sequence"
    if getattr(inner, "_is_stateful", False) or kind in ("mamba", "mamba2", "rwkv"):
        return _RECURRENT
    if kind in ("bloom", "mpt") or getattr(config, "alibi", False):
        return _ALIBI
    if kind == "gpt_neo":
        return "its local attention counts places in the row"
    if getattr(config, "attn_temperature_tuning", False):
        return "its attention temperature counts places in the row"
    if getattr(config, "output_router_logits", False):
        return "its router loss (output_router_logits) counts each token of the batch, a shared prompt as often as used"
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return "its forward takes no position_ids"
    try:
        reaches(config)
    except ValueError as error:
        return str(error)
    return None


def _compare(model: nn.Module, inner: Any, run: Run | None) -> Masks | str:
    """The first way that gives the plain layout's hidden states, or why none does."""
    ids, mask, labels = _small_batch(model, inner)
    row = lay_row(ids, mask, labels, shared=True)
    assert row is not None
    why = []
    with torch.no_grad(), without_autocast(ids.device), evaluating(model), _small_windows(inner.config):
        attend_as_before(inner.config)
        plain, _ = forward_without_logits(model, run, input_ids=ids, attention_mask=mask)
        expected = plain.flatten(0, 1)[row.places - 1].double()
        rounding = _ROUNDING.get(next(model.parameters()).dtype, _ROUNDING_OF_HALVES)
        # now, and not at the first such row: all processes of a sharded model are here
        behind = [torch.stack([*map(torch.roll, each, (mask == 0).sum(-1).tolist())]) for each in (ids, mask)]
        moved, _ = forward_without_logits(model, run, input_ids=behind[0], attention_mask=behind[1])
        if _apart(moved[behind[1] != 0].double(), plain[mask != 0].double()) > rounding:
            _count_padding.add(inner)
        flex = own_attention(inner.config) == "flex_attention"
        for way in (by_block_masks if flex else by_segments, by_dense_masks):
            try:
                hidden, _ = forward_without_logits(model, run, **inputs_of(model, row, way))
                hidden = hidden[0, row.index].double()
            except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                why.append(f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            apart = _apart(hidden, expected)
            if apart <= rounding:
                return way
            why.append(f"hidden states differ by {apart:.2g} of their norm")
    attend_as_before(inner.config)
    first = "with block masks" if flex else "by segments"
    return f"compared with the plain layout: {first}, {why[0]}; with dense masks, {why[1]}"


def _apart(hidden: Tensor, expected: Tensor) -> float:
    return float(((hidden - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _small_batch(model: nn.Module, inner: Any) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and labels of three pairs, two of the same prompt, of different lengths."""
    vocab, device = inner.config.get_text_config().vocab_size, device_of(model)
    prompts, chosen, rejected = (7, 7, 3), (3, 9, 2), (6, 1, 8)
    lengths = [p + r for side in (chosen, rejected) for p, r in zip(prompts, side, strict=True)]
    places = torch.arange(max(lengths), device=device)
    numbers = torch.arange(len(lengths), device=device)[:, None]
    prompt = torch.tensor(prompts * 2, device=device)[:, None]
    group = torch.tensor([0, 0, 1] * 2, device=device)[:, None]
    # large steps, so that neighbours and sequences differ in any vocabulary
    ids = (37 * places + torch.where(places < prompt, 101 * group, 211 * numbers + 17)) % vocab
    mask = (places < torch.tensor(lengths, device=device)[:, None]).long()
    labels = ids.masked_fill((places < prompt) | (mask == 0), -100)
    return ids, mask, labels


@contextmanager
def _small_windows(config: Any) -> Iterator[None]:
    """Windows shorter than the check's sequences, so that they are compared too."""
    text = config.get_text_config()
    limits = {n: getattr(text, n, None) for n in ("sliding_window", "attention_chunk_size")}
    limits = {name: value for name, value in limits.items() if value}
    try:
        for name in limits:
            setattr(text, name, _WINDOW)
        yield
    finally:
        for name, value in limits.items():
            setattr(text, name, value)
