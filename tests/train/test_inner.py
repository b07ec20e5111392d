"""SPO's lower level: values after inner steps, and nothing else changed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import Accelerator

from spo_kernels.data import Example
from spo_kernels.extras import bilevel
from spo_kernels.losses import SPO
from spo_kernels.train.batches import IGNORE_INDEX, collate
from spo_kernels.train.checkpoint import capture_rng
from spo_kernels.train.inner import InnerSteps
from spo_kernels.train.loop import Trainer
from spo_kernels.train.policy import Policy

from .conftest import Fails, Train, Whole, assert_close_weights, assert_same_weights, read_metrics
from .test_resume import OPTIONS, interrupted, stop_after, without_times
from .test_training import QUICK, run

__all__ = ["stop_after"]
pytestmark = pytest.mark.usefixtures("shared_references")
HINGE = ("--spo-penalty", "hinge")
INNER = (*HINGE, "--spo-inner-steps", 1, "--spo-inner-lr", 0.05, "--spo-weight", 2.0)


@pytest.fixture
def model(model_dir: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def make_batch() -> dict[str, Any]:
    """Three pairs; the longest rejected response is longer than any chosen one."""
    rows = [([5, 6, 7], [8, 9], [10, 11, 12, 13, 14]), ([20], [21], [22, 23]), ([30, 31], [32, 33, 34], [35])]
    input_ids, labels = collate(
        (Example(torch.tensor(p).numpy(), tuple(torch.tensor(r).numpy() for r in rs)) for p, *rs in rows),
        torch.device("cpu"),
    )
    return {"input_ids": input_ids, "labels": labels}


def eager_values(model: Any, batch: dict[str, Any], steps: int, rate: float, normalization: str) -> torch.Tensor:
    """The same with the model's own logits, float64 and torch.optim.SGD."""
    model = copy.deepcopy(model).double().eval()
    rows = len(batch["labels"]) // 2

    def nll() -> torch.Tensor:
        logp = model(input_ids=batch["input_ids"][:rows]).logits[:, :-1].log_softmax(-1)
        labels = batch["labels"][:rows, 1:]
        counted = labels != IGNORE_INDEX
        sums = (logp.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * counted).sum(-1)
        return -sums / counted.sum(-1) if normalization == "mean" else -sums

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nll().mean().backward()
        optimizer.step()
    return nll().detach()


@pytest.mark.parametrize("normalization", ["mean", "sum"])
@pytest.mark.parametrize("steps", [1, 3])
def test_values_equal_plain_sgd(model: Any, steps: int, normalization: str) -> None:
    batch, policy = make_batch(), Policy(model, SPO())
    expected = eager_values(model, batch, steps, 0.05, normalization)
    before = eager_values(model, batch, 0, 0.05, normalization)
    assert (before - expected).mean() > 1e-2
    values = InnerSteps(steps, 0.05, normalization).values(policy, batch, Accelerator(), shared=True)
    assert not values.requires_grad
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)


def test_frozen_parameters_take_no_step(model: Any) -> None:
    model.get_input_embeddings().weight.requires_grad_(False)  # tied: head and embedding
    batch = make_batch()
    expected = eager_values(model, batch, 2, 0.05, "mean")
    values = InnerSteps(2, 0.05, "mean").values(Policy(model, SPO()), batch, Accelerator(), shared=True)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)


def dropout_gpt2(vocabulary: int) -> Any:
    config = tf.GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return tf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_disturbed(tokenizer: Any, checkpointing: bool) -> None:
    """Weights, .grad, modes and random state, of a model with dropout in the middle of accumulation."""
    model = dropout_gpt2(len(tokenizer))
    policy = Policy(model, SPO()).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.chosen_logps(**make_batch()).sum().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in policy.parameters()]
    modes, random = [m.training for m in policy.modules()], capture_rng()
    inner = InnerSteps(2, 0.3, "mean")
    values = inner.values(policy, make_batch(), Accelerator(), shared=True)
    for parameter, (weight, gradient) in zip(policy.parameters(), before, strict=True):
        assert torch.equal(parameter, weight) and torch.equal(parameter.grad, gradient)
    assert [m.training for m in policy.modules()] == modes
    assert torch.equal(capture_rng()["torch"], random["torch"])
    # no dropout in the values: they repeat, and equal those of a model without any
    torch.testing.assert_close(inner.values(policy, make_batch(), Accelerator(), shared=True), values, rtol=0, atol=0)
    expected = eager_values(model, make_batch(), 2, 0.3, "mean")
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-4)


def test_weights_come_back_after_an_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(model, SPO())
    before = [p.detach().clone() for p in policy.parameters()]
    step = bilevel._descend

    def failing(*arguments: Any) -> None:
        step(*arguments)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bilevel, "_descend", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        InnerSteps(1, 0.5, "mean").values(policy, make_batch(), Accelerator(), shared=True)
    assert all(torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))


def test_autocast_sees_each_step(model: Any) -> None:
    """Half-precision copies of weights that autocast keeps must not outlive a step."""
    batch, policy = make_batch(), Policy(model, SPO())
    values = InnerSteps(3, 0.05, "mean").values(policy, batch, Accelerator(mixed_precision="bf16"), shared=True)
    expected = eager_values(model, batch, 3, 0.05, "mean")
    two = eager_values(model, batch, 2, 0.05, "mean")
    assert (values - expected).abs().mean() < 0.2 * (two - expected).abs().mean()


@pytest.mark.parametrize("extra", [(), ("--lora-r", 4)], ids=["full", "lora"])
def test_accumulation_does_not_change_inner_weights(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: tuple[Any, ...]
) -> None:
    """Every micro-batch's steps start from the weights of the optimizer step."""
    if extra:
        pytest.importorskip("peft")
    seen: list[list[torch.Tensor]] = []
    original = InnerSteps.values

    def watched(self: InnerSteps, policy: Policy, *arguments: Any, **options: Any) -> torch.Tensor:
        seen.append([p.detach().clone() for p in policy.parameters() if p.requires_grad])
        values = original(self, policy, *arguments, **options)
        kept = [p for p in policy.parameters() if p.requires_grad]
        assert all(torch.equal(p, b) for p, b in zip(kept, seen[-1], strict=True))
        return values

    monkeypatch.setattr(InnerSteps, "values", watched)
    run(train, tmp_path / "out", *INNER, *extra, "--grad-accum", 2, "--max-steps", 2)
    assert len(seen) == 4
    for first, second in ((0, 1), (2, 3)):
        assert all(torch.equal(a, b) for a, b in zip(seen[first], seen[second], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))


def test_the_value_reaches_the_loss(train: Train, tmp_path: Path) -> None:
    """An inner step lowers the value below the NLL, so the hinge is active and adds loss; a tiny one adds little."""
    dpo = read_metrics(run(train, tmp_path / "dpo", "--loss", "dpo"), "train")[0]["loss"]
    losses = []
    for rate in (1e-6, 0.05):
        out = run(train, tmp_path / str(rate), *HINGE, "--spo-inner-steps", 1, "--spo-inner-lr", rate)
        losses.append(read_metrics(out, "train")[0]["loss"])
    assert losses[0] == pytest.approx(dpo, abs=1e-4)
    assert losses[1] > dpo + 1e-3


def test_gradient_checkpointing_changes_nothing(train: Train, tmp_path: Path) -> None:
    plain = run(train, tmp_path / "plain", *INNER)
    assert_close_weights(plain, run(train, tmp_path / "checkpointed", *INNER, "--gradient-checkpointing"), atol=2e-4)


def test_evaluation_does_not_touch_training(train: Train, tmp_path: Path, pairs_file: Path) -> None:
    rare = run(train, tmp_path / "rare", *INNER, "--eval-dataset", pairs_file)
    often = run(train, tmp_path / "often", *INNER, "--eval-dataset", pairs_file, "--eval-steps", 1)
    assert_same_weights(rare, often)


@pytest.mark.parametrize(
    "extra", [(), ("--lora-r", 4, "--lora-dropout", 0.2), ("--bf16",)], ids=["full", "lora", "bf16"]
)
def test_resumed_run_is_the_same(
    train: Train, whole: Whole, tmp_path: Path, stop_after: Any, extra: tuple[Any, ...]
) -> None:
    if "--lora-r" in extra:
        pytest.importorskip("peft")
    undisturbed = whole(*OPTIONS, *INNER, *extra)
    interrupted(train, stop_after, 5, *INNER, *extra)
    assert train(*OPTIONS, *INNER, *extra, "--resume") == 0
    assert without_times(tmp_path / "out") == without_times(undisturbed)
    assert_same_weights(tmp_path / "out" / "checkpoint-9", undisturbed / "checkpoint-9")


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "no rate": ((*HINGE, "--spo-inner-steps", 1), "--spo-inner-steps and --spo-inner-lr go together"),
    "no steps": ((*HINGE, "--spo-inner-lr", 0.1), "--spo-inner-steps and --spo-inner-lr go together"),
    "rate 0": ((*HINGE, "--spo-inner-steps", 1, "--spo-inner-lr", 0), "--spo-inner-lr must be above 0, got 0"),
    "negative": (("--spo-inner-steps", -1), "--spo-inner-steps must be at least 0, got -1"),
    "dpo": (("--loss", "dpo", *INNER[2:6]), "--spo-inner-steps is for --loss spo, got --loss dpo"),
    "nll": (INNER[2:6], "--spo-inner-steps needs --spo-penalty hinge"),
    "two values": ((*INNER, "--spo-value", "reference"), "--spo-value reference names another"),
    "sft": (("--stage", "sft", *INNER[2:6]), "--spo-inner-steps, --spo-inner-lr would not be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_fit(fails: Fails, name: str) -> None:
    options, message = REFUSED[name]
    assert message in fails(*options)


def test_changed_inner_steps_do_not_resume(train: Train, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_evaluate", lambda self, log: True)
    assert train(*QUICK, *INNER, "--save-steps", 1) == 0
    message = fails(*QUICK[2:], *INNER, "--save-steps", 1, "--max-steps", 3, "--spo-inner-steps", 2, "--resume")
    assert "--spo-inner-steps was 1 and is now 2" in message
