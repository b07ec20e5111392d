"""A killed and resumed run ends bit for bit like one that was not; checkpoints are whole or absent."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from spo_kernels.train import checkpoint as checkpoint_module
from spo_kernels.train.checkpoint import capture_rng, newest_checkpoint, restore_rng, save_checkpoint
from spo_kernels.train.errors import TrainError
from spo_kernels.train.loop import Trainer

from .conftest import (
    CHAT_TEMPLATE,
    ENVIRONMENT,
    Fails,
    Train,
    assert_same_weights,
    build_tokenizer,
    read_metrics,
    read_weights,
)

TIMES = {"tokens_per_second", "peak_memory_mib"}
OPTIONS = (
    "--max-steps",
    9,
    "--save-steps",
    2,
    "--logging-steps",
    3,
    "--eval-fraction",
    0.25,
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
    "options",
    [
        (),
        ("--lora-r", 4, "--lora-dropout", 0.2),
        ("--reference", "online", "--bf16"),
        ("--schedule", "cosine"),
    ],
    ids=["full", "lora with dropout", "online bf16", "cosine"],
)
@pytest.mark.parametrize("steps", [5, 7])
def test_resumed_run_is_the_same(
    train: Train, tmp_path: Path, stop_after: Any, steps: int, options: tuple[Any, ...]
) -> None:
    """Step 5 dies between log lines: the window of the metrics must survive too."""
    assert train(*OPTIONS, *options, output_dir=tmp_path / "whole") == 0
    interrupted(train, stop_after, steps, *options)
    assert train(*OPTIONS, *options, "--resume") == 0
    assert without_times(tmp_path / "out") == without_times(tmp_path / "whole")
    name = "adapter_model" if "--lora-r" in options else "model"
    assert (tmp_path / "out" / f"{name}.safetensors").read_bytes() == (
        tmp_path / "whole" / f"{name}.safetensors"
    ).read_bytes()
    assert_same_weights(tmp_path / "out" / "checkpoint-9", tmp_path / "whole" / "checkpoint-9")


def test_sigkill_half_way(tmp_path: Path, model_dir: Path, pairs_file: Path) -> None:
    """A real process, a real SIGKILL at whatever instant it happens to be in."""
    settings = ["--max-steps", 60, "--save-steps", 5, "--batch-size", 4, "--learning-rate", 1e-3, "--quiet"]
    settings += ["--model", model_dir, "--dataset", pairs_file, "--eval-fraction", 0.2]

    def start(output: str, *extra: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "spo_kernels.train",
            *map(str, settings),
            "--output-dir",
            output,
            *extra,
        ]
        return subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE)

    whole = start("whole")
    process = start("killed")
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint-20").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    resumed = start("killed", "--resume")
    for run in (whole, resumed):
        _, error = run.communicate(timeout=120)
        assert run.returncode == 0, error
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")


def test_resume_of_a_finished_run_changes_nothing(train: Train, tmp_path: Path) -> None:
    assert train(*OPTIONS) == 0
    weights, metrics = read_weights(tmp_path / "out"), read_metrics(tmp_path / "out")
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    assert train(*OPTIONS, "--resume") == 0
    assert read_metrics(tmp_path / "out") == metrics
    again = read_weights(tmp_path / "out")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def test_resume_before_the_first_checkpoint_starts_again(
    train: Train, tmp_path: Path, stop_after: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*OPTIONS, output_dir=tmp_path / "whole") == 0
    interrupted(train, stop_after, 1)
    assert train(*OPTIONS, "--resume") == 0
    assert "holds no complete checkpoint yet: starting again from step 0" in capsys.readouterr().err
    assert without_times(tmp_path / "out") == without_times(tmp_path / "whole")


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
    assert f"checkpoint-2: --{option} was" in message and f"is now {CHANGES[option][1]!r}" in message


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


def test_harmless_settings_may_change(train: Train, tmp_path: Path, stop_after: Any) -> None:
    assert train(*OPTIONS, output_dir=tmp_path / "whole") == 0
    interrupted(train, stop_after, 5)
    changed = ("--save-steps", 4, "--keep-checkpoints", 1, "--logging-steps", 1, "--eval-steps", 0)
    assert train(*OPTIONS, "--resume", *changed) == 0
    assert_same_weights(tmp_path / "out", tmp_path / "whole")


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


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "manifest"])
@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_damaged_checkpoint_is_named(
    train: Train,
    tmp_path: Path,
    stop_after: Any,
    fails: Fails,
    damage: str,
    file: str,
) -> None:
    interrupted(train, stop_after, 5)
    folder = tmp_path / "out" / "checkpoint-4"
    path = folder / ("checkpoint.json" if damage == "manifest" else file)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-9] if damage != "flipped" else bytes([whole[0] ^ 1]) + whole[1:])
    reason = {"cut": f"{len(whole) - 9} bytes instead of {len(whole)}", "flipped": "its checksum differs"}
    message = fails(*OPTIONS, "--resume")
    assert f"{path}: damaged checkpoint ({reason.get(damage, '')}" in message
    assert f"remove {folder} to resume from the one before" in message


def test_foreign_pickle_is_not_executed(
    train: Train,
    tmp_path: Path,
    stop_after: Any,
    fails: Fails,
) -> None:
    """A state.pt whose checksum is right but that holds code is refused by the weights-only load."""
    interrupted(train, stop_after, 3)
    folder = tmp_path / "out" / "checkpoint-2"
    forged(folder, {"optimizer": Malicious(tmp_path / "proof")})
    assert "state.pt: damaged checkpoint" in fails(*OPTIONS, "--resume")
    assert not (tmp_path / "proof").exists()


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.path),))


def test_incomplete_folder_is_renamed(tmp_path: Path) -> None:
    said: list[str] = []
    save_checkpoint(tmp_path, 3, {"w": torch.ones(2)}, {"a": 1}, {}, keep=0)
    for _ in range(2):
        (tmp_path / "checkpoint-7").mkdir()
        found = newest_checkpoint(tmp_path, said.append)
    assert found is not None and found.step == 3 and torch.equal(found.weights()["w"], torch.ones(2))
    assert "checkpoint-7 is incomplete (no checkpoint.json) and is now called checkpoint-7.incomplete" in said[0]
    assert said[1].endswith("checkpoint-7.incomplete-2")


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_incomplete_checkpoint_is_not_in_the_way(train: Train, tmp_path: Path, stop_after: Any, kind: str) -> None:
    """Neither of the step where the run will save next, nor of one that --keep-checkpoints counts."""
    assert train(*OPTIONS, output_dir=tmp_path / "whole") == 0
    interrupted(train, stop_after, 5)
    for step in (6, 100):
        path = tmp_path / "out" / f"checkpoint-{step}"
        if kind == "folder":
            path.mkdir()
            (path / "model.safetensors").write_bytes(b"half")
        elif kind == "file":
            path.write_text("")
        else:
            path.symlink_to(tmp_path / "none")
    assert train(*OPTIONS, "--resume", "--keep-checkpoints", 2) == 0
    assert_same_weights(tmp_path / "out", tmp_path / "whole")
    names = {p.name for p in (tmp_path / "out").glob("*checkpoint*")}
    assert names == {"checkpoint-8", "checkpoint-9", "checkpoint-6.incomplete", "checkpoint-100.incomplete"}


def test_incomplete_checkpoint_that_appears_later(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    save_checkpoint(tmp_path, 3, {"w": torch.ones(2)}, {}, {}, keep=1)
    assert newest_checkpoint(tmp_path, print).step == 3
    assert (tmp_path / "checkpoint-3.incomplete").exists()


def forged(folder: Path, state: Any) -> None:
    """Another state.pt with a checksum that is right."""
    torch.save(state, folder / "state.pt")
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["files"]["state.pt"] = checkpoint_module._describe(folder / "state.pt")
    (folder / "checkpoint.json").write_text(json.dumps(manifest))


STATES: dict[str, Any] = {
    "a list": [1, 2],
    "a number": 7,
    "nothing in it": {},
    "no processes": {"optimizer": {"state": {}, "param_groups": []}},
    "tensor": torch.ones(3),
}


@pytest.mark.parametrize("name", STATES)
def test_state_of_another_structure(train: Train, tmp_path: Path, stop_after: Any, fails: Fails, name: str) -> None:
    interrupted(train, stop_after, 3)
    forged(tmp_path / "out" / "checkpoint-2", STATES[name])
    assert "checkpoint-2/state.pt: damaged checkpoint (" in fails(*OPTIONS, "--resume")


PARTS = {
    "optimizer": lambda s: s["optimizer"].update(param_groups=[{}]),
    "scheduler": lambda s: s.update(scheduler=[]),
    "random state": lambda s: s["processes"][0]["rng"].update(torch=torch.ones(3)),
    "window": lambda s: s["processes"][0].update(window={"sums": 3}),
    "processes": lambda s: s.update(processes=[]),
}


@pytest.mark.parametrize("name", PARTS)
def test_part_of_the_state_of_another_structure(
    train: Train, tmp_path: Path, stop_after: Any, fails: Fails, name: str
) -> None:
    interrupted(train, stop_after, 3)
    folder = tmp_path / "out" / "checkpoint-2"
    state = torch.load(folder / "state.pt", weights_only=True)
    PARTS[name](state)
    forged(folder, state)
    assert "checkpoint-2/state.pt: damaged checkpoint (" in fails(*OPTIONS, "--resume")


ENTRY = {"bytes": 1, "sha256": "0"}
MANIFESTS: dict[str, Any] = {
    "a list": [1],
    "null": None,
    "files a list": {"files": [1, 2]},
    "files a number": {"files": 3},
    "no files": {"files": {}},
    "other files": {"files": {"../../secret": ENTRY}},
    "entries numbers": {"files": {"model.safetensors": 1, "state.pt": 2}},
    "entries lists": {"files": {"model.safetensors": [], "state.pt": []}},
    "entries empty": {"files": {"model.safetensors": {}, "state.pt": {}}},
    "sizes text": {"files": {n: {"bytes": "x", "sha256": []} for n in ("model.safetensors", "state.pt")}},
    "identity a list": {"identity": []},
    "step text": {"step": "2"},
    "format a list": {"format": [2]},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_of_other_types(train: Train, tmp_path: Path, stop_after: Any, fails: Fails, name: str) -> None:
    interrupted(train, stop_after, 3)
    path = tmp_path / "out" / "checkpoint-2" / "checkpoint.json"
    changed = MANIFESTS[name]
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed} if isinstance(changed, dict) else changed))
    message = fails(*OPTIONS, "--resume")
    assert "damaged checkpoint (" in message and "checkpoint-2" in message


@pytest.mark.parametrize("content", [b"\xff", b"[" * 200_000, b"\0\0", b"", b'{"step": ' + b"9" * 5000 + b"}"])
def test_manifest_that_is_no_json(train: Train, tmp_path: Path, stop_after: Any, fails: Fails, content: bytes) -> None:
    interrupted(train, stop_after, 3)
    (tmp_path / "out" / "checkpoint-2" / "checkpoint.json").write_bytes(content)
    assert "checkpoint-2/checkpoint.json: damaged checkpoint (" in fails(*OPTIONS, "--resume")


@pytest.mark.parametrize("value", ["many", [3], -1])
def test_identity_of_other_types(train: Train, tmp_path: Path, stop_after: Any, fails: Fails, value: Any) -> None:
    interrupted(train, stop_after, 3)
    path = tmp_path / "out" / "checkpoint-2" / "checkpoint.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["max_steps"] = value
    path.write_text(json.dumps(manifest))
    assert f"--max-steps was {value!r} and is now" in fails(*OPTIONS, "--resume")


LINES = {"not UTF-8": b'{"step": 1\xff}\n', "NUL": b"\0\0\0\n", "deep": b"[" * 200_000 + b"\n"}
LINES |= {"long number": b'{"step": ' + b"9" * 5000 + b', "split": "train"}\n', "no step": b"{}\n"}


@pytest.mark.parametrize("name", LINES)
def test_bad_line_of_metrics_is_named(train: Train, tmp_path: Path, stop_after: Any, fails: Fails, name: str) -> None:
    interrupted(train, stop_after, 5)
    path = tmp_path / "out" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + LINES[name] + b'{"step": 9, "split": "train"}\n')
    assert re.search(r"metrics\.jsonl:4: not a line of metrics: '.*remove the line", fails(*OPTIONS, "--resume"))


@pytest.mark.parametrize("tail", [b"\0" * 100, b'{"step": 7, "sp', b"\xff\xfe"])
def test_cut_last_line_of_metrics(train: Train, tmp_path: Path, stop_after: Any, tail: bytes) -> None:
    """As a kill or a power failure leaves it: those steps run again."""
    assert train(*OPTIONS, output_dir=tmp_path / "whole") == 0
    interrupted(train, stop_after, 5)
    path = tmp_path / "out" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert train(*OPTIONS, "--resume") == 0
    assert without_times(tmp_path / "out") == without_times(tmp_path / "whole")


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
    epochs = ("--max-steps", 0, "--batch-size", 9, "--grad-accum", 1, "--save-steps", 3)
    assert train(*OPTIONS, *epochs, "--epochs", 1) == 0
    assert train(*OPTIONS, *epochs, "--epochs", 2, "--resume") == 0
    lines = read_metrics(tmp_path / "out", "train")
    assert lines[-1]["step"] == 8 and lines[-1]["epoch"] == 2
    # The schedule over 8 steps, from its middle.
    assert [line["lr"] for line in lines][-1] == 0 and lines[-2]["lr"] == pytest.approx(1e-2 * 2 / 8)
    assert "--epochs was 2.0 and is now 1.0" in fails(*OPTIONS, "--resume", *epochs, "--epochs", 1, "--max-steps", 0)


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
