"""A batch laid in a row, token by token, and what goes with its labels."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from spo_kernels.integrations.layout import lay_pairs
from spo_kernels.integrations.layout.rows import lay_row
from spo_kernels.integrations.transformers import FusedPreferenceModel
from tests.integrations.packing import PACKED, PAIRS, SHARED, assert_same, batch_of, build, gradients, row_of


@pytest.mark.parametrize("shared", [False, True])
def test_each_label_is_predicted_by_what_stands_before_it(shared: bool) -> None:
    row, batch = row_of(shared), batch_of()
    assert row.input_ids.shape == (1, SHARED if shared else PACKED)
    starts = [0, *torch.tensor([segment.length for segment in row.segments]).cumsum(0).tolist()]
    tokens, positions = row.input_ids[0].tolist(), row.position_ids[0].tolist()
    owner = {place: n for n in range(len(row.segments)) for place in range(starts[n], starts[n + 1])}
    width = batch["labels"].shape[1]
    expected = [
        (ids[:column], ids[column], number * width + column)
        for number, (ids, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"], strict=True))
        for column in range(1, width)
        if labels[column] != -100
    ]
    found = []
    for place, label, source in zip(row.index.tolist(), row.labels.tolist(), row.places.tolist(), strict=True):
        segment, start = row.segments[owner[place]], starts[owner[place]]
        before = [*range(starts[segment.trunk], starts[segment.trunk] + segment.prefix), *range(start, place + 1)]
        assert [positions[p] for p in before] == list(range(len(before)))
        found.append(([tokens[p] for p in before], label, source))
    assert found == expected
    assert row.cu_seqlens.diff().tolist() == (batch["labels"] != -100).sum(-1).tolist()


def padded_in_front(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    empty = (batch["attention_mask"] == 0).sum(-1).tolist()
    return {key: torch.stack([*map(torch.roll, value, empty)]) for key, value in batch.items()}


def test_padding_on_either_side() -> None:
    left = padded_in_front(batch_of())
    assert left["attention_mask"][:, -1].all() and not left["attention_mask"][:, 0].all()
    ours, theirs = row_of(**left), row_of()
    for name in ("input_ids", "position_ids", "index", "labels", "cu_seqlens"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.segments == theirs.segments
    assert torch.equal(left["labels"].flatten()[ours.places], ours.labels)
    model = build("llama")
    losses = [FusedPreferenceModel(model, "simpo", layout=layout)(**left)[0] for layout in ("padded", "shared")]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_positions_that_count_padding_in_front() -> None:
    model, batch = build("gpt2"), batch_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(gradients(model, "shared", batch, "simpo"), gradients(model, "padded", batch, "simpo"))
    with pytest.warns(UserWarning, match="its positions count padding in front of a sequence"):
        shared = gradients(model, "shared", padded_in_front(batch), "simpo")
    assert_same(shared, gradients(model, "padded", padded_in_front(batch), "simpo"))


def test_without_a_mask_every_token_counts() -> None:
    ids = torch.tensor([[1, 5, 6, 7], [1, 5, 8, 9]])
    labels = ids.masked_fill(torch.tensor([True, True, False, False]), -100)
    row = row_of(input_ids=ids, attention_mask=None, labels=labels)  # type: ignore[arg-type]
    assert row.input_ids.tolist() == [[1, 5, 6, 8]] and row.index.tolist() == [1, 2, 1, 3]


def test_a_gap_in_the_mask_is_computed_padded() -> None:
    batch = batch_of()
    batch["attention_mask"][0, 1] = 0
    losses = [
        FusedPreferenceModel(build("llama"), "simpo", layout=layout)(**batch)[0] for layout in ("padded", "shared")
    ]
    assert torch.equal(*losses)


def test_nothing_scored_is_no_row() -> None:
    batch = batch_of()
    batch["labels"].fill_(-100)
    assert lay_row(**batch, shared=True) is None
    module = FusedPreferenceModel(build("llama"), "simpo", layout="shared")
    assert module(**batch)[0].shape == ()


ONES = [{"prompt_ids": [1, 5], "chosen_ids": [7, 8], "rejected_ids": []}, PAIRS[4]]


@pytest.mark.parametrize("records", [PAIRS, ONES], ids=["", "as many labels as sequences"])
def test_values_of_tokens_go_with_their_labels(records: list[dict[str, list[int]]]) -> None:
    model, batch = build("llama"), batch_of(records)
    torch.manual_seed(0)
    weights, logps = torch.rand(batch["labels"].shape), -torch.rand(batch["labels"].shape)
    cases: list[dict[str, Tensor]] = [
        {"ref_logps": logps.sum(-1)},
        {"ref_logps": logps},
        {"ref_logps": logps, "token_weights": weights},
    ]
    for given in cases:
        assert_same(*(gradients(model, layout, batch, **given) for layout in ("shared", "padded")))


def test_gradients_of_a_shared_token_have_the_same_bits_in_every_run(threads: Callable[[int], None]) -> None:
    """All responses begin at their prompt's last token, whose gradient has a part of each."""
    threads(2)
    ids = torch.randint(2, 40, (64, 12), generator=torch.Generator().manual_seed(0))
    ids[:, :3] = torch.arange(2, 5)
    labels = ids.masked_fill(torch.arange(12) < 3, -100)
    model = build("llama")
    laid = lay_pairs(model, labels, "shared", input_ids=ids, attention_mask=torch.ones_like(ids))
    inputs, of_labels = laid.for_model(model)
    # so wide that torch shares the work between threads
    hidden = torch.randn(*inputs["input_ids"].shape, 64, requires_grad=True)
    upstream = torch.randn(len(laid.labels), 64)
    assert upstream.numel() > 32768
    first, *others = (torch.autograd.grad(of_labels(hidden), hidden, upstream)[0] for _ in range(100))
    assert all(torch.equal(first, other) for other in others)
