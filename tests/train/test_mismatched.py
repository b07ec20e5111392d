"""KTO's mismatched pairs: which response goes with which prompt, and the ratios of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from spo_kernels.data import Example
from spo_kernels.train.loop import Trainer
from spo_kernels.train.mismatched import MISMATCHED, MismatchedExamples

from .conftest import Fails, Train, write_jsonl


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


PAIRS = [
    Example(ids(1), (ids(11, 12), ids(13))),
    Example(ids(1), (ids(21), ids(22, 23))),
    Example(ids(2, 3), (ids(31, 32, 33), ids(34)), scored=(((0, 1), (2, 3)), ())),
]


def test_the_next_other_prompts_response() -> None:
    """Chosen and rejected in turns; never a response to the same prompt; no longer than the longest sequence, 5."""
    found = list(MismatchedExamples(PAIRS))
    assert [example.prompt.tolist() for example in found] == [[1], [1], [2, 3]]
    assert [example.responses[0].tolist() for example in found] == [[31, 32, 33], [34], [11, 12]]
    assert found[0].spans(0) == ((0, 1), (2, 3)) and found[0].response_length(0) == 2


def test_long_ones_are_cut() -> None:
    long = [Example(ids(1), (ids(5, 6, 7, 8), ids(9))), Example(ids(1, 2, 3), (ids(4), ids(4)))]
    found = MismatchedExamples([long[1], long[0]])[0]
    assert found.prompt.tolist() == [1, 2, 3] and found.responses[0].tolist() == [5, 6]
    scored = Example(ids(1), (ids(5, 6, 7, 8), ids(9)), scored=(((0, 1), (3, 4)), ()))
    assert MismatchedExamples([long[1], scored])[0].spans(0) == ((0, 1),)


def test_one_prompt_alone(fails: Fails, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    options = ("--loss", "kto", "--loss-arg", "kl=mismatched")
    assert "needs records of two different prompts" in fails(*options, dataset=data)


@pytest.mark.parametrize("reference", ["precompute", "online"])
def test_ratios_are_the_models_own(
    train: Train, monkeypatch: pytest.MonkeyPatch, model_dir: Path, reference: str
) -> None:
    """Those of full logits, of the policy as it is and of the model that the run began with."""
    seen: list[torch.Tensor] = []
    before = AutoModelForCausalLM.from_pretrained(model_dir)
    original = Trainer._batch

    def watched(self: Trainer, split: Any, indices: list[int], training: bool) -> Any:
        batch = original(self, split, indices, training)
        policy = self.accelerator.unwrap_model(self.policy).model
        examples = [split.mismatched.examples[i] for i in indices]
        expected = torch.stack([full_logits(policy, e) - full_logits(before, e) for e in examples])
        ratios = batch["pair_inputs"][MISMATCHED]
        torch.testing.assert_close(ratios, expected, rtol=1e-4, atol=1e-4)
        seen.append(ratios)
        return batch

    monkeypatch.setattr(Trainer, "_batch", watched)
    options = ("--loss", "kto", "--loss-arg", "kl=mismatched", "--learning-rate", 1e-2, "--reference", reference)
    assert train(*options, "--max-steps", 3, "--batch-size", 4) == 0
    assert len(seen) == 3 and seen[2].abs().min() > 1e-2


def full_logits(model: Any, example: Example) -> torch.Tensor:
    """log π(y|x) by the model's own logits."""
    row = torch.tensor([*example.prompt, *example.responses[0]])[None].long()
    with torch.no_grad():
        logp = model(input_ids=row).logits.log_softmax(-1)[0, :-1].gather(-1, row[0, 1:, None])[:, 0]
    return logp[len(example.prompt) - 1 :].sum()
