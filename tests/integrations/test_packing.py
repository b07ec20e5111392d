"""Training with packed rows and shared prompts is training with the padded batch, and computes no padding."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers.pytorch_utils import Conv1D

from spo_kernels.integrations.layout import hidden_of_pairs, segments, ways
from spo_kernels.integrations.layout.masks import additive
from spo_kernels.integrations.layout.rows import PairRow, lay_row
from spo_kernels.integrations.transformers import FusedPreferenceModel
from spo_kernels.losses import DPO
from tests.integrations.packing import (
    CONFIGS,
    PACKED,
    PAIRS,
    SHARED,
    assert_same,
    batch_of,
    build,
    gradients,
    row_of,
)


def train(name: str, layout: str) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """Losses of 20 steps, weights before and after."""
    model = build(name)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    if name == "gpt2":
        # a bias of keys adds the same to all scores of a query: AdamW would divide its gradient's rounding by itself
        for block in model.transformer.h:
            block.attn.c_attn.bias.register_hook(lambda grad: torch.cat([grad[:16], 0 * grad[16:32], grad[32:]]))
    policy = FusedPreferenceModel(model, DPO(beta=0.3), reference=build(name, seed=1), layout=layout)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-4)
    losses = []
    for step in range(20):
        loss, _ = policy(**batch_of(PAIRS[step % 3 :]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, before, [parameter.detach() for parameter in model.parameters()]


train_padded = cache(partial(train, layout="padded"))


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


def differences(name: str, layout: str) -> tuple[float, float]:
    """The largest relative difference of a loss from the padded run, and that of the weights over what they moved."""
    expected, before, padded = train_padded(name)
    losses, _, weights = train(name, layout)
    apart = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    moved = norm([b - a for a, b in zip(before, padded, strict=True)])
    return apart, norm([a - b for a, b in zip(weights, padded, strict=True)]) / moved


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_that_of_the_padded_batch(name: str) -> None:
    for layout in ("packed", "shared"):
        of_loss, of_weights = differences(name, layout)
        assert of_loss <= 1e-5 and of_weights <= 1e-3, (layout, of_loss, of_weights)


def leaking(*given: Any, **settings: Any) -> PairRow | None:
    """A row whose later responses see all of the first one, not its prompt alone."""
    row = lay_row(*given, **settings)
    assert row is not None
    lengths = [segment.length for segment in row.segments]
    return replace(row, segments=tuple(s._replace(prefix=s.prefix and lengths[s.trunk]) for s in row.segments))


def test_a_mask_that_leaks_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spo_kernels.integrations.layout.batch.lay_row", leaking)
    of_loss, of_weights = differences("llama", "shared")
    assert of_loss > 1e-3 and of_weights > 0.1, (of_loss, of_weights)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_comparison_finds_a_mask_that_leaks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "lay_row", leaking)
    with pytest.raises(
        ways.NotExact, match=r"by segments, hidden states differ by .*dense masks, hidden states differ"
    ):
        ways.way_of(build(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_masks_say_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows by positions; a dict where layers differ."""
    model, batch = build(name).eval(), batch_of()
    monkeypatch.setattr(ways, "by_segments", ways.by_dense_masks)
    hidden, *_ = hidden_of_pairs(model, **batch, layout="shared")
    expected, *_ = hidden_of_pairs(model, **batch, layout="padded")
    scored = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(hidden, expected[:, :-1][scored], rtol=1e-4, atol=1e-5)
    mask = ways.by_dense_masks(model.config, row_of(), torch.float32)
    assert isinstance(mask, dict) == (name == "gemma2")


@pytest.mark.parametrize("name", CONFIGS)
def test_long_segments_take_several_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them has more numbers than the limit, and the gradient is the padded batch's."""
    made: list[int] = []

    def counted(seen: Tensor, dtype: torch.dtype) -> Tensor:
        made.append(seen.numel() * dtype.itemsize)
        return additive(seen, dtype)

    model, batch = build(name), batch_of()
    expected = gradients(model, "padded", batch, loss="simpo")
    monkeypatch.setattr(segments, "_BLOCK_BYTES", 150)
    monkeypatch.setattr(segments, "additive", counted)
    assert_same(gradients(model, "shared", batch, loss="simpo"), expected)
    assert len(made) > 20 and max(made) <= 150, made


@pytest.mark.parametrize(("layout", "tokens"), [("packed", PACKED), ("shared", SHARED)])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_padding_enters_a_product(name: str, layout: str, tokens: int) -> None:
    model = build(name)
    ways.way_of(model)
    rows: set[int] = set()
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            module.register_forward_pre_hook(lambda _, given: rows.add(given[0].shape[:-1].numel()))
    FusedPreferenceModel(model, "simpo", layout=layout)(**batch_of())
    assert rows == {tokens}
    rows.clear()
    FusedPreferenceModel(model, "simpo", layout="padded")(**batch_of())
    assert rows == {batch_of()["labels"].numel()}
