"""The pieces in real loops: transformers' Trainer, accelerate, two processes under DDP, the examples."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

tf = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from datasets import Dataset  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from examples import accelerate_loop, transformers_trainer  # noqa: E402
from spo_kernels.integrations.transformers import (  # noqa: E402
    FusedPreferenceModel,
    PairCollator,
    precompute_ref_logps,
)
from tests.integrations.ddp_ranks import RECORDS, train  # noqa: E402
from tests.integrations.ddp_ranks import batch_of as with_sums  # noqa: E402
from tests.integrations.test_transformers import PAIRS, REFERENCE, batch_of, build, full_logits, lora  # noqa: E402
from tests.processes import Forked, exit_codes, run_module, torchrun  # noqa: E402

WITH_SUMS = [
    {**pair, "ref_chosen_logps": float(REFERENCE[i]), "ref_rejected_logps": float(REFERENCE[3 + i])}
    for i, pair in enumerate(PAIRS)
]


def test_collator() -> None:
    batch = PairCollator(9, max_length=6)(WITH_SUMS)
    assert batch["input_ids"].tolist()[1] == [1, 4, 30, 2, 9, 9]
    assert batch["input_ids"].tolist()[4] == [1, 4, 31, 32, 33, 34]
    assert batch["labels"].tolist()[4] == [-100, -100, 31, 32, 33, 34]
    assert batch["attention_mask"].tolist()[1] == [1, 1, 1, 1, 0, 0]
    assert batch["ref_logps"].tolist() == REFERENCE.tolist()
    assert "ref_logps" not in PairCollator(9)(PAIRS)
    with pytest.raises(KeyError, match=r"a record lacks rejected_ids \(token ids\); it has prompt_ids, chosen_ids"):
        PairCollator(9)([{"prompt_ids": [1], "chosen_ids": [2]}])
    with pytest.raises(ValueError, match="max_length = 2 leaves nothing of the response after a prompt of 2 tokens"):
        PairCollator(9, max_length=2)([{"prompt_ids": [1, 4], "chosen_ids": [2], "rejected_ids": []}])
    with pytest.raises(KeyError, match="a record lacks ref_rejected_logps, which others have"):
        PairCollator(9)([WITH_SUMS[0], {**PAIRS[1], "ref_chosen_logps": -1.0}])
    with pytest.raises(TypeError, match="chosen_ids must be token ids, got the text 'blue'"):
        PairCollator(9)([{**PAIRS[0], "chosen_ids": "blue"}])
    with pytest.raises(ValueError, match="pad_token_id must be the id of a token, got -1"):
        PairCollator(-1)
    with pytest.raises(ValueError, match="max_length must be a whole number of at least 1, got 0"):
        PairCollator(9, max_length=0)
    assert PairCollator(9, max_length=2)([{"prompt_ids": [1, 4], "chosen_ids": [], "rejected_ids": []}])


@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapters off"])
def test_reference_sums_in_the_order_of_the_records(adapted: bool) -> None:
    base = build("cohere").eval()
    model = lora(build("cohere")).train() if adapted else base.train()
    found = precompute_ref_logps(model, [batch_of(PAIRS[:2]), batch_of(PAIRS[2:])])
    assert model.training
    expected = full_logits(base.eval(), batch_of()).detach().view(2, 3).T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert precompute_ref_logps(model, []).shape == (0, 2)
    with pytest.raises(TypeError, match="dataloader must give batches of PairCollator, with input_ids and labels"):
        precompute_ref_logps(model, PAIRS)


def test_reference_sums_with_token_weights() -> None:
    """Those of LD-DPO: policy and reference are then equal."""
    model = build("llama")
    sums = precompute_ref_logps(model, [batch_of(PAIRS[:2]), batch_of(PAIRS[2:])], ld_alpha=0.3)
    _, metrics = FusedPreferenceModel(model, "dpo", ld_alpha=0.3)(**batch_of(), ref_logps=sums.T.flatten())
    torch.testing.assert_close(metrics["loss"], torch.tensor(2.0).log())
    with pytest.raises(TypeError, match="token_weights"):
        precompute_ref_logps(model, [], token_weights=torch.ones(4, 8))  # type: ignore[call-arg]


@pytest.mark.parametrize("call", ["precompute", "adapters off"])
def test_dropout_that_is_switched_off_stays_off(call: str) -> None:
    """Module by module, as TRL's `disable_dropout_in_model` may be undone by `train()`."""
    model = lora(build("llama"), lora_dropout=0.5).train()
    dropouts = [module.eval() for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts and model.training
    if call == "precompute":
        precompute_ref_logps(model, [batch_of()])
    else:
        policy = FusedPreferenceModel(model, "dpo", reference="adapters_off")
        losses = [policy(**batch_of())[0].item() for _ in range(2)]
        assert losses[0] == losses[1]
    assert model.training and not any(module.training for module in dropouts)


def test_trainer_accumulates_the_mean(tmp_path: Path) -> None:
    """Two forwards of one pair each are one of two pairs, in loss and weights; not twice as much."""
    results = []
    for size in (1, 2):
        model = build("llama")
        arguments = TrainingArguments(
            str(tmp_path / str(size)), per_device_train_batch_size=size, gradient_accumulation_steps=2 // size,
            max_steps=2, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0,
            logging_steps=1, report_to="none", remove_unused_columns=False, save_strategy="no", use_cpu=True,
        )  # fmt: skip
        data = Dataset.from_list(WITH_SUMS[:2])
        trainer = Trainer(FusedPreferenceModel(model, "dpo"), arguments, PairCollator(0), data)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, model.state_dict()))
    (one, first), (two, second) = results
    assert one == pytest.approx(two, rel=1e-4) and len(one) == 2
    start = build("llama").state_dict()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(value, start[name]) for name, value in first.items())


def test_two_ranks_under_ddp(tmp_path: Path) -> None:
    """Both end with the same bits, and with what one process makes of all pairs."""
    processes = [
        Forked(tmp_path, run_module, "tests.integrations.ddp_ranks", tmp_path, **variables) for variables in torchrun(2)
    ]
    assert exit_codes(processes, 150) == [0, 0], [process.written for process in processes]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    model = build("tied")
    expected = full_logits(model, PairCollator(0)(RECORDS)).detach().view(2, 4).T
    torch.testing.assert_close(ranks[0]["sums"], expected, rtol=1e-4, atol=1e-5)
    train(FusedPreferenceModel(model, "dpo"), [with_sums(RECORDS, ranks[0]["sums"])])
    for name, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][name]), name
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-6)


def saved_model(folder: Path) -> tuple[str, str]:
    """Where a model with its tokenizer is, and a file of 12 pairs."""
    from tests.train.conftest import build_tokenizer, pair

    tokenizer = build_tokenizer(chat=False)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair(i)) + "\n" for i in range(12)))
    return str(folder / "model"), str(pairs)


def test_the_examples_run_and_learn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, pairs = saved_model(tmp_path)
    before = tf.AutoModelForCausalLM.from_pretrained(model)
    settings = {"max_steps": 3, "learning_rate": 1e-2, "use_cpu": True, "save_strategy": "no"}
    transformers_trainer.main(model, pairs, str(tmp_path / "trainer"), **settings)
    after = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "trainer")
    assert not torch.equal(after.get_output_embeddings().weight, before.get_output_embeddings().weight)

    accelerate_loop.main(model, pairs, str(tmp_path / "loop"), epochs=2, rate=1e-2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss")]
    assert len(lines) == 6 and lines[0].startswith("loss 0.6931") and not lines[-1].startswith("loss 0.6931")
    assert (tmp_path / "loop" / "adapter_model.safetensors").exists()


def test_the_example_begins_prompts_alone() -> None:
    from tests.train.conftest import build_tokenizer, pair

    tokenizer = build_tokenizer(bos=True, chat=False)
    ids = transformers_trainer.encode(pair(0), tokenizer)
    assert [ids[f"{key}_ids"].count(tokenizer.bos_token_id) for key in ("prompt", "chosen", "rejected")] == [1, 0, 0]


@pytest.mark.parametrize("example", [transformers_trainer, accelerate_loop])
def test_the_examples_are_short(example: Any) -> None:
    lines = inspect.getsource(example.main).splitlines()
    assert len(lines) <= 30
