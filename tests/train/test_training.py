"""What a run computes: equivalences between settings, metrics, saved files."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from spo_kernels.train.loop import Trainer

from .conftest import Train, assert_close_weights, assert_same_weights, read_metrics, read_weights

QUICK = (
    "--max-steps",
    3,
    "--learning-rate",
    1e-2,
    "--batch-size",
    4,
    "--logging-steps",
    1,
    "--save-steps",
    0,
)


def run(train: Train, output: Path, *options: Any, **overrides: Any) -> Path:
    assert train(*QUICK, *options, output_dir=output, **overrides) == 0
    return output


@pytest.fixture(params=["preference", "sft"])
def stage(request: pytest.FixtureRequest, sft_file: Path, pairs_file: Path) -> dict[str, Any]:
    return {"stage": request.param, "dataset": sft_file if request.param == "sft" else pairs_file}


@pytest.mark.usefixtures("shared_references")
def test_accumulation_equals_one_batch(train: Train, tmp_path: Path, stage: dict[str, Any]) -> None:
    """Also for sft, where the two halves of a batch have different numbers of tokens."""
    options, data = ("--stage", stage["stage"]), stage["dataset"]
    whole = run(train, tmp_path / "whole", *options, dataset=data)
    halves = run(train, tmp_path / "halves", *options, "--batch-size", 2, "--grad-accum", 2, dataset=data)
    # Adam divides by the gradient's size: where that is rounding noise, a step may differ by a share of 1e-2.
    assert_close_weights(whole, halves, atol=2e-4)
    for a, b in zip(read_metrics(whole, "train"), read_metrics(halves, "train"), strict=True):
        for name in ("loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        ("--loss", "dpo"),
        ("--spo-penalty", "hinge", "--spo-weight", 2.0),
        ("--loss", "sgdpo"),
        ("--base-loss", "sgdpo", "--ld-alpha", 0.5),
        ("--loss", "kto", "--loss-arg", "kl=mismatched"),
        ("--loss", "kto", "--loss-arg", "kl=mismatched", "--ld-alpha", 0.5, "--batch-size", 3),
    ],
    ids=["dpo", "hinge", "drawn tokens", "drawn and weighted tokens", "mismatched", "mismatched, weighted tokens"],
)
def test_online_reference_equals_precomputed(train: Train, tmp_path: Path, loss: tuple[Any, ...]) -> None:
    cached = run(train, tmp_path / "cached", *loss, "--eval-fraction", 0.25)
    online = run(train, tmp_path / "online", *loss, "--eval-fraction", 0.25, "--reference", "online")
    assert_close_weights(cached, online, atol=2e-4)
    assert not (online / "reference-cache").exists()
    for a, b in zip(read_metrics(cached), read_metrics(online), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], abs=1e-4)


@pytest.mark.usefixtures("shared_references")
def test_gradient_checkpointing_changes_nothing(train: Train, tmp_path: Path) -> None:
    plain = run(train, tmp_path / "plain")
    assert_close_weights(plain, run(train, tmp_path / "checkpointed", "--gradient-checkpointing"), atol=2e-4)


def test_the_first_step_is_what_the_objective_says(
    train: Train, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient of one step against the model's own logits, on the same batch."""
    seen: list[dict[str, Any]] = []
    original = Trainer._optimizer_step

    def watched(self: Trainer) -> Any:
        batch = self.train.batch(list(range(len(self.train.examples))), torch.device("cpu"))
        seen.append({**batch, "norm": original(self)})
        return seen[-1]["norm"]

    monkeypatch.setattr(Trainer, "_optimizer_step", watched)
    options = (
        "--batch-size",
        48,
        "--max-steps",
        1,
        "--beta",
        0.3,
        "--spo-weight",
        0.5,
        "--max-grad-norm",
        1e9,
    )
    output = run(train, tmp_path / "out", *options)
    model = tf.AutoModelForCausalLM.from_pretrained(model_dir)
    logp = model(input_ids=seen[0]["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels = seen[0]["labels"][:, 1:]
    sums = (logp.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * (labels != -100)).sum(-1)
    torch.testing.assert_close(seen[0]["ref_logps"], sums.detach(), rtol=1e-4, atol=1e-4)
    # The reference is the policy, so each margin is 0.
    margin = sums[:48] - sums[48:] - (sums[:48] - sums[48:]).detach()
    nll = -sums[:48] / (labels[:48] != -100).sum(-1)
    loss = (-torch.nn.functional.logsigmoid(0.3 * margin) + 0.5 * nll).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    (record,) = read_metrics(output, "train")
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_lora_trains_adapters_only(train: Train, tmp_path: Path, model_dir: Path) -> None:
    peft = pytest.importorskip("peft")
    options = ("--lora-r", 4, "--lora-dropout", 0.1, "--save-steps", 2)
    cached = run(train, tmp_path / "cached", *options)
    assert (cached / "adapter_model.safetensors").exists() and not (cached / "model.safetensors").exists()
    assert all("lora_" in name for name in read_weights(cached / "checkpoint-2"))
    base = tf.AutoModelForCausalLM.from_pretrained(model_dir)
    adapted = peft.PeftModel.from_pretrained(base, cached)
    changed = [p for n, p in adapted.named_parameters() if "lora_B" in n]
    assert changed and all(p.abs().max() > 0 for p in changed)


def test_lora_online_reference_is_the_model_without_adapters(train: Train, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    cached = run(train, tmp_path / "cached", "--lora-r", 4)
    online = run(train, tmp_path / "online", "--lora-r", 4, "--reference", "online", "--gradient-checkpointing")
    for a, b in zip(read_metrics(cached), read_metrics(online), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert read_metrics(online)[-1]["rewards/margins"] != 0


@pytest.mark.parametrize("extra", [(), ("--lora-r", 4), ("--reference", "online")], ids=["full", "lora", "online"])
def test_bfloat16(train: Train, tmp_path: Path, extra: tuple[Any, ...]) -> None:
    exact = run(train, tmp_path / "exact", *extra)
    rounded = run(train, tmp_path / "rounded", "--bf16", *extra)
    for a, b in zip(read_metrics(exact), read_metrics(rounded), strict=True):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=2e-2)
    if extra != ("--lora-r", 4):
        assert all(w.dtype == torch.float32 for w in read_weights(rounded).values())


@pytest.mark.usefixtures("shared_references")
def test_sft_then_preference_learns(train: Train, tmp_path: Path, sft_file: Path, pairs_file: Path) -> None:
    options = ("--max-steps", 40, "--logging-steps", 20, "--eval-fraction", 0.2)
    sft = run(train, tmp_path / "sft", "--stage", "sft", *options, dataset=sft_file)
    before, after = read_metrics(sft, "eval")
    assert after["loss"] < 0.7 * before["loss"]
    assert after["mean_token_accuracy"] > before["mean_token_accuracy"]
    spo = run(train, tmp_path / "spo", *options, "--learning-rate", 2e-3, model=sft, dataset=pairs_file)
    before, after = read_metrics(spo, "eval")
    assert before["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert after["rewards/accuracies"] > 0.8 and after["rewards/margins"] > 0.1


def test_metrics_and_files(train: Train, tmp_path: Path) -> None:
    output = run(
        train,
        tmp_path / "out",
        "--max-steps",
        5,
        "--logging-steps",
        2,
        "--eval-fraction",
        0.25,
        "--eval-steps",
        2,
    )
    lines = [(r["split"], r["step"]) for r in read_metrics(output)]
    assert lines == [
        ("eval", 0),
        ("train", 2),
        ("eval", 2),
        ("train", 4),
        ("eval", 4),
        ("train", 5),
        ("eval", 5),
    ]
    shared = {"step", "split", "loss", "logps/chosen", "logps/rejected", "logps/accuracies"}
    shared |= {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    extra = {"epoch", "lr", "grad_norm", "tokens_per_second", "peak_memory_mib"}
    assert {split: set(r) for r in read_metrics(output) for split in [r["split"]]} == {
        "train": shared | extra,
        "eval": shared,
    }
    assert json.loads((output / "args.json").read_text())["max_steps"] == 5
    assert [p.name for p in output.glob(".*")] == [".lock"]
    if importlib.util.find_spec("tensorboard"):
        assert list((output / "tensorboard").iterdir())
    model = tf.AutoModelForCausalLM.from_pretrained(output)
    assert model.config.use_cache
    assert tf.AutoTokenizer.from_pretrained(output).eos_token == "</s>"


@pytest.mark.usefixtures("shared_references")
def test_evaluation_does_not_touch_training(train: Train, tmp_path: Path, pairs_file: Path) -> None:
    rare = run(train, tmp_path / "rare", "--eval-dataset", pairs_file)
    often = run(train, tmp_path / "often", "--eval-dataset", pairs_file, "--eval-steps", 1)
    assert_same_weights(rare, often)
    assert [r["step"] for r in read_metrics(often, "eval")] == [0, 1, 2, 3]
    assert read_metrics(often, "eval")[0] == read_metrics(rare, "eval")[0]


@pytest.mark.usefixtures("shared_references")
def test_evaluation_is_the_mean_over_all_pairs(train: Train, tmp_path: Path) -> None:
    """48 pairs in batches of 4 and of 7: a short last batch weighs what it holds."""
    options = ("--eval-fraction", 0.5, "--max-steps", 1)
    (a, *_), (b, *_) = (
        read_metrics(run(train, tmp_path / str(n), *options, "--batch-size", n), "eval") for n in (4, 7)
    )
    assert a == {k: pytest.approx(v, abs=1e-4) for k, v in b.items() if k != "rewards/accuracies"} | {
        "split": "eval",
        "rewards/accuracies": a["rewards/accuracies"],
    }


def test_seed_decides_everything(train: Train, tmp_path: Path) -> None:
    first, same = (run(train, tmp_path / name) for name in ("first", "same"))
    assert_same_weights(first, same)
    other = run(train, tmp_path / "other", "--seed", 1)
    assert any(not torch.equal(w, read_weights(other)[n]) for n, w in read_weights(first).items())


@pytest.mark.usefixtures("shared_references")
def test_warmup_and_schedules(train: Train, tmp_path: Path) -> None:
    expected = {"linear": [0.005, 0.01, 0.005, 0.0], "constant": [0.005, 0.01, 0.01, 0.01]}
    for schedule, rates in expected.items():
        options = ("--schedule", schedule, "--warmup-steps", 2, "--max-steps", 4)
        output = run(train, tmp_path / schedule, *options)
        assert [r["lr"] for r in read_metrics(output, "train")] == pytest.approx(rates)


@pytest.mark.usefixtures("shared_references")
def test_epochs_set_the_number_of_steps(train: Train, tmp_path: Path) -> None:
    output = run(train, tmp_path / "out", "--max-steps", 0, "--epochs", 1.5, "--batch-size", 10)
    assert read_metrics(output)[-1]["step"] == 8


def test_values_of_the_lower_level_come_from_the_data(train: Train, tmp_path: Path, pairs_file: Path) -> None:
    rows = [{**json.loads(line), "spo_value": 100.0} for line in pairs_file.read_text().splitlines()]
    path = tmp_path / "valued.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    hinge = ("--spo-penalty", "hinge", "--spo-value", "input")
    inactive = run(train, tmp_path / "hinge", *hinge, dataset=path)
    # No NLL exceeds 100, so the penalty is 0 and DPO is what remains.
    assert_same_weights(inactive, run(train, tmp_path / "dpo", "--loss", "dpo"))


def test_reference_free_objective_needs_no_reference(train: Train, tmp_path: Path) -> None:
    output = run(train, tmp_path / "out", "--loss-arg", "reference_free=true")
    assert not (output / "reference-cache").exists()
    assert read_metrics(output)[-1]["rewards/chosen"] != 0


def test_another_reference_model(train: Train, tmp_path: Path, model_dir: Path) -> None:
    first = run(train, tmp_path / "first", "--loss", "dpo")
    again = run(train, tmp_path / "again", "--loss", "dpo", "--ref-model", model_dir, model=first)
    assert read_metrics(again)[0]["rewards/margins"] > 0.01
    online = run(
        train,
        tmp_path / "online",
        "--loss",
        "dpo",
        "--ref-model",
        model_dir,
        "--reference",
        "online",
        model=first,
    )
    assert_close_weights(again, online, atol=2e-4)


def test_chat_data(train: Train, tmp_path: Path, pairs_file: Path) -> None:
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    chat = [
        {
            key: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[key]}]
            for key in ("chosen", "rejected")
        }
        for row in rows
    ]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(chat))
    assert read_metrics(run(train, tmp_path / "out", dataset=path))[-1]["step"] == 3


def test_gpt2_with_dropout(train: Train, tmp_path: Path, tokenizer: Any) -> None:
    config = tf.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    output = run(train, tmp_path / "out", "--reference", "online", "--gradient-checkpointing", model=tmp_path / "gpt2")
    assert read_metrics(output)[-1]["step"] == 3
