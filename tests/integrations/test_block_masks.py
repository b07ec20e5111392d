"""Rows for models whose attention is flex_attention: one kernel, told by blocks what there is to see.

Uncompiled here, which is slow and exact; its backward runs on a GPU alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as torchs
from transformers import masking_utils
from transformers.integrations import flex_attention as transformers_s

from spo_kernels.integrations.layout import hidden_of_pairs, masks, ways
from spo_kernels.integrations.layout.masks import Reach, block_mask, dense_mask

from .packing import batch_of, build, row_of


@pytest.mark.parametrize("reach", [Reach(), Reach(window=5), Reach(chunk=6)], ids=str)
def test_a_block_mask_says_what_the_dense_one_does(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_BLOCK", 8)
    row = row_of()
    tokens = row.position_ids.shape[1]
    assert tokens % 8
    mask = block_mask(row, reach)
    expected = dense_mask(row, reach, torch.float32)[0, 0] == 0
    zero, places = torch.tensor(0), torch.arange(tokens)
    assert torch.equal(mask.mask_mod(zero, zero, places[:, None], places), expected)
    # torch's own way from the function to blocks, which makes a mask of all tokens
    known = torchs.create_block_mask(mask.mask_mod, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=8)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(known, name)), name
    assert torch.equal(mask.to_dense(), known.to_dense()) and not mask.to_dense().all()


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_a_flex_attention_model_takes_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(*given: Any, training: bool = False, **options: Any) -> Any:
        return torchs.flex_attention(*given, **options)

    def blocks(*given: Any, _compile: bool = False, **options: Any) -> Any:
        return torchs.create_block_mask(*given, **options)

    monkeypatch.setattr(transformers_s, "compile_friendly_flex_attention", plain)
    # else torch compiles both, which takes 15 s
    monkeypatch.setattr(masking_utils, "create_block_mask", blocks)
    monkeypatch.setattr(torchs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    model, batch = build(name).eval(), batch_of()
    expected, *_ = hidden_of_pairs(model, **batch, layout="padded")
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        hidden, *_ = hidden_of_pairs(model, **batch, layout="shared")
    assert ways.way_of(model) is ways.by_block_masks
    scored = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(hidden, expected[:, :-1][scored], rtol=1e-4, atol=1e-5)
