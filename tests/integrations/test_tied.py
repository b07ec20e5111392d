"""`FusedPreferenceModel(accumulate=True)` on a head that is the embedding too: one gradient for both uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spo_kernels.integrations.transformers import FusedPreferenceModel
from spo_kernels.testing import TensorMeter

from .packing import PAIRS, batch_of, build

VOCAB, WIDTH = 4096, 128


def accumulated(model: Any, accumulate: bool, batches: int = 3) -> tuple[list[torch.Tensor], list[int]]:
    """Gradients after some backwards, and what each backward held at most."""
    model.zero_grad()
    policy, peaks = FusedPreferenceModel(model, "simpo", accumulate=accumulate), []
    for number in range(batches):
        with TensorMeter() as meter:
            policy(**batch_of(PAIRS[: number + 2]))[0].backward()
        peaks.append(meter.peak)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], peaks


# Gemma scales what it looks up
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_the_same(name: str, dtype: torch.dtype) -> None:
    model = build(name, tie_word_embeddings=True).to(dtype)
    embedding = model.get_input_embeddings()
    ours, theirs = (accumulated(model, accumulate)[0] for accumulate in (True, False))
    assert len(ours) == len(theirs) > 2
    for our, their in zip(ours, theirs, strict=True):
        largest = float(their.float().abs().max())
        digits = 2**-18 if dtype == torch.float32 else 2**-5
        torch.testing.assert_close(our, their, rtol=digits, atol=digits * largest)
    # as it was
    assert isinstance(embedding.weight, torch.nn.Parameter) and embedding.sparse is False
    assert embedding.weight is model.get_output_embeddings().weight


def test_one_buffer() -> None:
    """The first backward makes one `[V, H]`, later ones none; autograd alone makes three, then two or more."""
    model = build("llama", tie_word_embeddings=True, vocab_size=VOCAB, hidden_size=WIDTH)
    size = VOCAB * WIDTH * 4
    ours, theirs = (accumulated(model, accumulate)[1] for accumulate in (True, False))
    assert size <= ours[0] < 2 * size and max(ours[1:]) < size, [peak / size for peak in ours]
    assert min(theirs) >= 2 * size, [peak / size for peak in theirs]


def test_untied_and_frozen_models_are_left_alone() -> None:
    for settings, frozen in (({"tie_word_embeddings": False}, False), ({"tie_word_embeddings": True}, True)):
        model = build("llama", **settings)
        model.get_input_embeddings().weight.requires_grad_(not frozen)
        ours, theirs = (accumulated(model, accumulate)[0] for accumulate in (True, False))
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)
