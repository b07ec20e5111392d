"""The Python blocks of README and docs run as they are printed, those of a page one after the other."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pages
import pytest
import torch
import torch.nn.functional as F
from pages import DOCS

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from datasets import Dataset

from spo_kernels.integrations import trl as ours
from spo_kernels.integrations.transformers import PairCollator, hidden_states
from tests.integrations import tiny
from tests.integrations.test_loops import WITH_SUMS
from tests.integrations.test_transformers import PAIRS, REFERENCE, batch_of, build, full_logits, lora
from tests.train.conftest import build_tokenizer, pair, write_jsonl

# CONTRIBUTING's examples have a test of their own, which takes them further.
RUN = [page for page in pages.PAGES if pages.blocks(page, "python") and page.stem != "CONTRIBUTING"]
A_STEP = {"use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none"}


def given(page: str) -> dict[str, Any]:
    """What the blocks of a page take for granted: a model and its batch, by the names that pages use."""
    model, batch = lora(build("llama")) if page == "packing" else build("llama"), batch_of()
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    names = {
        "model": model,
        "batch": batch if page == "packing" else {**batch, "ref_logps": REFERENCE},
        "labels": labels,
        "hidden": hidden_states(model, **inputs).detach().requires_grad_(),
        "weight": model.get_output_embeddings().weight,
        "records": PAIRS,
        "ref_logps": REFERENCE,
        "step": 3,
        "steps": 2,
        "optimizer": torch.optim.SGD(model.parameters(), 1e-3),
        "pairs": tiny.dataset("pairs"),
        "tokenizer": build_tokenizer() if page == "training" else tiny.make_tokenizer(),
        "inputs": inputs,
        **inputs,
    }
    if page == "sharded-heads":
        names |= {"local_rows": names["weight"], "local_bias": None, "group": torch.distributed.group.WORLD}
        names |= {"mesh": torch.distributed.init_device_mesh("cpu", (1,))}
        names |= {"shift_labels": torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)}
    if page == "other-trainers":
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        names |= {"batch": inputs, "self": SimpleNamespace(model=model), "sequences": ids}
        names |= {"foward_attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        names |= {"rolled_sequences": ids.roll(-1, 1), "concatenated_batch": {"concatenated_labels": labels}}
    return names


@pytest.fixture
def short_trl(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """TRL's names of a script; a step on the CPU, and a reference, which a model without a hub id cannot have."""
    trl = pytest.importorskip("trl")
    reference = {"ref_model": build("llama", seed=1)}
    for name, settings in (("FusedDPOConfig", A_STEP), ("FusedDPOTrainer", reference)):
        monkeypatch.setattr(ours, name, partial(getattr(ours, name), **settings), raising=False)
    monkeypatch.setattr(trl, "DPOTrainer", partial(trl.DPOTrainer, **reference))
    return {"args": trl.DPOConfig("trl", **A_STEP)}


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of one process, for pages about several."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_blocks_run(
    page: Path,
    request: pytest.FixtureRequest,
    short_trl: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if page.stem == "sharded-heads":
        request.getfixturevalue("one_process")
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("pairs.jsonl"), [pair(i) for i in range(20)])
    names = given(page.stem) | short_trl
    try:
        for code in pages.blocks(page, "python"):
            exec(code, names)
    finally:
        ours.unpatch_trl()
    for name in ("logp", "loss", "all_logps", "log_probs"):
        assert torch.as_tensor(names.get(name, 0.0)).isfinite().all(), name
    if page.stem == "tokens":
        assert names["hidden"].grad.any() and names["kept"].unique().numel() == 8
        assert set(names["multipliers"].unique().tolist()) <= {0.0, 1.0}


def block(page: str, holds: str) -> str:
    found = [code for code in pages.blocks(DOCS / page, "python") if holds in code]
    assert len(found) == 1, page
    return found[0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("adapted", [False, True], ids=["", "peft"])
def test_loss_of_a_model(name: str, adapted: bool) -> None:
    """On a PeftModel as on its base, and with Gemma's softcap and Cohere's scale."""
    names: dict[str, Any] = {}
    exec(block("quickstart.md", "def compute_loss"), names)
    model = lora(build(name)) if adapted else build(name)
    batch = batch_of()
    loss, metrics = names["compute_loss"](model, {**batch, "ref_logps": REFERENCE})
    chosen, rejected = full_logits(model, batch).chunk(2)
    margin = chosen - rejected - (REFERENCE[:3] - REFERENCE[3:])
    lengths = (batch["labels"][:3, 1:] != -100).sum(-1)
    expected = (-F.logsigmoid(0.1 * margin) - chosen / lengths).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["logps/rejected"], rejected.detach().mean(), rtol=1e-4, atol=1e-5)


def test_compute_loss_under_accumulation(tmp_path: Path) -> None:
    """Losses and gradient norms are those of one forward with both pairs."""
    names: dict[str, Any] = {}
    exec(block("transformers.md", "class PreferenceTrainer"), names)
    logs = []
    for size in (1, 2):
        arguments = transformers.TrainingArguments(
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
