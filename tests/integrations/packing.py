"""Models and pairs for the tests of packed rows and shared prompts."""

from typing import Any

import torch
import transformers as tf
from tiny_models import SIZES
from torch import Tensor

from spo_kernels.integrations.layout.rows import PairRow, lay_row
from spo_kernels.integrations.transformers import FusedPreferenceModel, PairCollator

DEEP = {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.3, **PLAIN}
# shorter than the rows
WINDOW = {**DEEP, "sliding_window": 5}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, DEEP),
    "qwen3": (tf.Qwen3Config, DEEP),
    "gemma2": (tf.Gemma2Config, {**WINDOW, "final_logit_softcapping": 3.0}),
    "mistral": (tf.MistralConfig, WINDOW),
    "gpt2": (tf.GPT2Config, GPT2),
}
# prompts of two pairs, responses of one token, one that is empty, two that begin alike
PAIRS = [
    {"prompt_ids": [1, 5, 9, 14, 6, 8, 12], "chosen_ids": [7, 8, 10, 2], "rejected_ids": [7, 8, 11, 30, 31, 2]},
    {"prompt_ids": [1, 4], "chosen_ids": [30], "rejected_ids": [31, 32, 33, 34, 35, 36, 37, 38, 2]},
    {"prompt_ids": [1, 5, 9, 14, 6, 8, 12], "chosen_ids": [17], "rejected_ids": [40, 2]},
    {"prompt_ids": [1, 40, 41, 42], "chosen_ids": [50, 51], "rejected_ids": []},
    {"prompt_ids": [1, 4], "chosen_ids": [2], "rejected_ids": [3]},
]
# tokens that predict something: of each sequence, and where what sequences have in common is laid once
PACKED = (10 + 2 + 7 + 5 + 2) + (12 + 10 + 8 + 0 + 2)
SHARED = (10 + 3 + 0 + 1) + (2 + 8 + 0 + 0) + 5


def build(name: str, seed: int = 0, **settings: Any) -> Any:
    """A model of CONFIGS."""
    kind, given = CONFIGS[name]
    torch.manual_seed(seed)
    return tf.AutoModelForCausalLM.from_config(kind(**{**given, **settings}))


def batch_of(records: list[dict[str, list[int]]] = PAIRS) -> dict[str, Tensor]:
    return PairCollator(0)(records)


def row_of(shared: bool = True, **batch: Tensor) -> PairRow:
    """The row of a batch, of PAIRS where none is given."""
    row = lay_row(**(batch or batch_of()), shared=shared)
    assert row is not None
    return row


def gradients(model: Any, layout: str, batch: dict[str, Tensor], loss: Any = "dpo", **given: Any) -> list[Tensor]:
    """The loss, and the gradients of whatever is trained."""
    model.zero_grad()
    policy = FusedPreferenceModel(model, loss, reference=given.pop("reference", None), layout=layout)
    value, _ = policy(**batch, **given)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """What `gradients` gave, up to rounding."""
    assert len(ours) == len(theirs) > 1
    largest = max(float(grad.abs().max()) for grad in theirs[1:])
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-6 * largest)
