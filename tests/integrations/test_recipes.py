"""The recipes of README and docs/transformers.md, as they are printed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from datasets import Dataset
from transformers import TrainingArguments

from spo_kernels.integrations.transformers import PairCollator
from tests.integrations.test_loops import WITH_SUMS
from tests.integrations.test_transformers import PAIRS, REFERENCE, batch_of, build, full_logits, lora

ROOT = Path(__file__).resolve().parents[2]


def block(page: str, holds: str) -> str:
    found = [code for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S) if holds in code]
    assert len(found) == 1, page
    return found[0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("adapted", [False, True], ids=["", "peft"])
def test_readme(name: str, adapted: bool) -> None:
    """On a PeftModel as on its base, and with Gemma's softcap and Cohere's scale."""
    names: dict[str, Any] = {}
    exec(block("README.md", "def compute_loss"), names)
    model = lora(build(name)) if adapted else build(name)
    batch = batch_of()
    loss, metrics = names["compute_loss"](model, {**batch, "ref_logps": REFERENCE})
    chosen, rejected = full_logits(model, batch).chunk(2)
    margin = chosen - rejected - (REFERENCE[:3] - REFERENCE[3:])
    lengths = (batch["labels"][:3, 1:] != -100).sum(-1)
    expected = (-F.logsigmoid(0.1 * margin) - chosen / lengths).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["logps/rejected"], rejected.detach().mean(), rtol=1e-4, atol=1e-5)


def test_module_with_everything() -> None:
    model = build("llama")
    names: dict[str, Any] = {"model": model, "records": PAIRS, "ref_logps": REFERENCE}
    exec(block("docs/transformers.md", "policy = FusedPreferenceModel"), names)
    assert names["loss"].isfinite() and model.get_output_embeddings().weight.grad.abs().sum() > 0


def test_compute_loss_under_accumulation(tmp_path: Path) -> None:
    """Losses and gradient norms are those of one forward with both pairs."""
    names: dict[str, Any] = {}
    exec(block("docs/transformers.md", "class PreferenceTrainer"), names)
    logs = []
    for size in (1, 2):
        arguments = TrainingArguments(
            str(tmp_path / str(size)), per_device_train_batch_size=size, gradient_accumulation_steps=2 // size,
            max_steps=1, logging_steps=1, report_to="none", remove_unused_columns=False, save_strategy="no",
            use_cpu=True,
        )  # fmt: skip
        data = Dataset.from_list(WITH_SUMS[:2])
        trainer = names["PreferenceTrainer"](build("llama"), arguments, PairCollator(0), data)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for key in ("loss", "grad_norm"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-4)
