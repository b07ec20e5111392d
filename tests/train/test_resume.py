"""A killed and resumed run ends bit for bit like one that was not; checkpoints are whole or absent."""

import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from spo_kernels.train import checkpoint as checkpoint_module
from spo_kernels.train.checkpoint import capture_rng, newest_checkpoint, restore_rng, save_checkpoint
from spo_kernels.train.errors import TrainError
from spo_kernels.train.loop import Trainer
from tests.processes import Forked, run_module

from .conftest import (
    CHAT_TEMPLATE,
    Fails,
    Train,
    Whole,
    assert_same_weights,
    build_tokenizer,
    read_metrics,
    read_weights,
)

pytestmark = pytest.mark.usefixtures("shared_references")
TIMES = {"tokens_per_second", "peak_memory_mib"}
OPTIONS = (
    "--max-steps",
    9,
    "--save-steps",
    2,
    "--logging-steps",
    3,
    "--eval-fraction",
    0.1,
    "--eval-steps",
    3,
)
OPTIONS += ("--batch-size", 2, "--grad-accum", 2, "--learning-rate", 1e-2, "--keep-checkpoints", 0)


class Interrupted(Exception):
    """Stands for a kill in this process."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """stop_after(5): the next run dies in its sixth step."""
    original = Trainer._optimizer_step

    def arrange(steps: int | None) -> None:
        def step(self: Trainer) -> Any:
            if self.step == steps:
                raise Interrupted
            return original(self)

        monkeypatch.setattr(Trainer, "_optimizer_step", step)

    return arrange


def interrupted(train: Train, stop_after: Any, steps: int, *options: Any, **overrides: Any) -> None:
    stop_after(steps)
    with pytest.raises(Interrupted):
        train(*OPTIONS, *options, **overrides)
    stop_after(None)


def without_times(output: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(output)]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ((), 5),
        ((), 7),
        (("--lora-r", 4, "--lora-dropout", 0.2), 5),
        (("--reference", "online", "--bf16"), 7),
        (("--schedule", "cosine"), 5),
    ],
    ids=["full-5", "full-7", "lora with dropout", "online bf16", "cosine"],
)
def test_resumed_run_is_the_same(
    train: Train, whole: Whole, tmp_path: Path, stop_after: Any, steps: int, options: tuple[Any, ...]
) -> None:
    """Step 5 dies between log lines: the window of the metrics must survive too."""
    undisturbed = whole(*OPTIONS, *options)
    interrupted(train, stop_after, steps, *options)
    assert train(*OPTIONS, *options, "--resume") == 0
    assert without_times(tmp_path / "out") == without_times(undisturbed)
    name = "adapter_model" if "--lora-r" in options else "model"
    assert (tmp_path / "out" / f"{name}.safetensors").read_bytes() == (undisturbed / f"{name}.safetensors").read_bytes()
    assert_same_weights(tmp_path / "out" / "checkpoint-9", undisturbed / "checkpoint-9")


def test_sigkill_half_way(train: Train, tmp_path: Path, model_dir: Path, pairs_file: Path) -> None:
    """A real process, a real SIGKILL at whatever instant it happens to be in."""
    settings = ("--max-steps", 24, "--save-steps", 5, "--batch-size", 4, "--learning-rate", 1e-3)
    settings += ("--eval-fraction", 0.2)
    given = ("--quiet", "--model", model_dir, "--dataset", pairs_file, "--output-dir", tmp_path / "out")
    process = Forked(tmp_path, run_module, "spo_kernels.train", *given, *settings)
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "checkpoint-10").exists():
        assert process.is_alive() and time.monotonic() < deadline, process.written[1]
        time.sleep(0.001)
    process.kill()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert train(*settings, output_dir=tmp_path / "whole") == 0
    assert train(*settings, "--resume") == 0
    assert_same_weights(tmp_path / "out", tmp_path / "whole")
    assert without_times(tmp_path / "out") == without_times(tmp_path / "whole")


def test_resume_of_a_finished_run_changes_nothing(train: Train, tmp_path: Path) -> None:
    assert train(*OPTIONS) == 0
    weights, metrics = read_weights(tmp_path / "out"), read_metrics(tmp_path / "out")
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    assert train(*OPTIONS, "--resume") == 0
    assert read_metrics(tmp_path / "out") == metrics
    again = read_weights(tmp_path / "out")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def test_resume_before_the_first_checkpoint_starts_again(
    train: Train, whole: Whole, tmp_path: Path, stop_after: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = whole(*OPTIONS)
    interrupted(train, stop_after, 1)
    assert train(*OPTIONS, "--resume") == 0
    assert "holds no complete checkpoint yet: starting again from step 0" in capsys.readouterr().err
    assert without_times(tmp_path / "out") == without_times(undisturbed)


def test_only_the_newest_checkpoints_are_kept(train: Train, tmp_path: Path) -> None:
    assert train(*OPTIONS, "--keep-checkpoints", 2) == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*checkpoint*")) == ["checkpoint-8", "checkpoint-9"]


CHANGES = {
    "beta": ("--beta", 0.3),
    "learning-rate": ("--learning-rate", 1e-3),
    "batch-size": ("--batch-size", 4),
    "seed": ("--seed", 5),
    "max-steps": ("--max-steps", 20),
    "lora-r": ("--lora-r", 2),
    "two": ("--beta", 0.3, "--seed", 5),
}


@pytest.mark.parametrize("option", CHANGES)
def test_changed_setting_is_named(
    train: Train,
    tmp_path: Path,
    stop_after: Any,
    fails: Fails,
    option: str,
) -> None:
    interrupted(train, stop_after, 3)
    message = fails(*OPTIONS, "--resume", *CHANGES[option])
    _, _, said = message.partition("checkpoint-2: ")
    changes = CHANGES[option]
    for flag, value in zip(changes[::2], changes[1::2], strict=True):
        assert f"{flag} was" in said and f"is now {value!r}" in said
    assert "content" not in said


def test_changed_data_and_model_are_noticed(
    train: Train,
    tmp_path: Path,
    stop_after: Any,
    model_dir: Path,
    pairs_file: Path,
    fails: Fails,
) -> None:
    import transformers as tf

    data, model = Path(shutil.copy(pairs_file, tmp_path / "d.jsonl")), tmp_path / "m"
    shutil.copytree(model_dir, model)
    interrupted(train, stop_after, 3, dataset=data, model=model)
    original = data.read_text()
    data.write_text(original.replace("cat", "dog"))
    assert "data content was" in fails(*OPTIONS, "--resume", dataset=data, model=model)
    data.write_text(original)
    changed = tf.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.model.norm.weight[0] += 1
    changed.save_pretrained(model)
    assert "model content was" in fails(*OPTIONS, "--resume", dataset=data, model=model)


def test_harmless_settings_may_change(train: Train, whole: Whole, tmp_path: Path, stop_after: Any) -> None:
    undisturbed = whole(*OPTIONS)
    interrupted(train, stop_after, 5)
    changed = ("--save-steps", 4, "--keep-checkpoints", 1, "--logging-steps", 1, "--eval-steps", 0)
    assert train(*OPTIONS, "--resume", *changed) == 0
    assert_same_weights(tmp_path / "out", undisturbed)


def test_other_software_is_mentioned(
    train: Train,
    stop_after: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another number of threads adds up in another order."""
    interrupted(train, stop_after, 3)
    torch.set_num_threads(2)
    assert train(*OPTIONS, "--resume") == 0
    assert re.search(r"resumed with .* 2 threads a run that began with .* 1 threads", capsys.readouterr().err)


def test_finished_run_goes_on(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a constant learning rate, to the same weights as a longer run."""
    longer = ("--schedule", "constant", "--max-steps", 14)
    assert train(*OPTIONS, *longer, output_dir=tmp_path / "whole") == 0
    assert train(*OPTIONS, "--schedule", "constant") == 0
    assert train(*OPTIONS, *longer, "--resume") == 0
    assert "finished after 9 steps and goes on to 14" in capsys.readouterr().err
    assert_same_weights(tmp_path / "out", tmp_path / "whole")
    assert without_times(tmp_path / "out")[-1] == without_times(tmp_path / "whole")[-1]


def test_first_step_of_a_run_that_goes_on_learns(train: Train, tmp_path: Path) -> None:
    """With the rate of the longer schedule, not with the 0 that the shorter one ended with."""
    assert train(*OPTIONS) == 0
    before = {n: t.clone() for n, t in read_weights(tmp_path / "out").items()}
    assert train(*OPTIONS, "--max-steps", 10, "--resume") == 0
    assert any(not torch.equal(before[n], t) for n, t in read_weights(tmp_path / "out").items())


def test_tokenizer_with_a_folder_is_saved_again(train: Train, tmp_path: Path, model_dir: Path) -> None:
    """Several chat templates are a folder, which a rename does not replace."""
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tools": CHAT_TEMPLATE}
    tokenizer.save_pretrained(model)
    assert train(*OPTIONS, model=model) == 0
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").exists()
    assert train(*OPTIONS, "--resume", model=model) == 0
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").exists()
    assert not list((tmp_path / "out").glob(".*.old"))


def test_finished_run_goes_on_for_epochs(train: Train, tmp_path: Path, fails: Fails) -> None:
    # 36 of 48 records to train on
    epochs = ("--max-steps", 0, "--batch-size", 9, "--grad-accum", 1, "--save-steps", 3, "--eval-fraction", 0.25)
    assert train(*OPTIONS, *epochs, "--epochs", 1) == 0
    assert train(*OPTIONS, *epochs, "--epochs", 2, "--resume") == 0
    lines = read_metrics(tmp_path / "out", "train")
    assert lines[-1]["step"] == 8 and lines[-1]["epoch"] == 2
    # The schedule over 8 steps, from its middle.
    assert [line["lr"] for line in lines][-1] == 0 and lines[-2]["lr"] == pytest.approx(1e-2 * 2 / 8)
    assert "--epochs was 2.0 and is now 1.0" in fails(*OPTIONS, "--resume", *epochs, "--epochs", 1, "--max-steps", 0)


def test_a_warm_up_that_never_ends_is_warned_of(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*OPTIONS, "--max-steps", 2, "--warmup-steps", 2) == 0
    assert "--warmup-steps 2 is no less than the run's 2 steps, which end before" in capsys.readouterr().err
    assert train(*OPTIONS, "--max-steps", 3, "--warmup-steps", 2, "--resume") == 0
    assert "--warmup-steps" not in capsys.readouterr().err


def test_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, {"w": torch.ones(2)}, {}, {}, keep=0)
    with pytest.raises(TrainError, match="checkpoint-3 exists already and is not overwritten"):
        save_checkpoint(tmp_path, 3, {"w": torch.zeros(2)}, {}, {}, keep=0)


def test_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 3, {"w": torch.ones(2)}, {}, {}, keep=1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", full)
    with pytest.raises(TrainError, match=r"checkpoint-4: can't be written .*No space left.*earlier checkpoints"):
        save_checkpoint(tmp_path, 4, {"w": torch.ones(2)}, {}, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_random_state_round_trip(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(()).item(), float(np.random.randn())]

    draw()
    save_checkpoint(tmp_path, 1, {"w": torch.ones(1)}, {"rng": capture_rng()}, {}, keep=0)
    expected = draw()
    found = newest_checkpoint(tmp_path, print)
    assert found is not None
    restore_rng(found.state()["rng"])
    assert draw() == expected
