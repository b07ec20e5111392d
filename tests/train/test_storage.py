"""Full disks, folders that can't be written and two runs in one folder: a sentence, and training is not lost."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers as tf
from filelock import FileLock
from safetensors.torch import load_file
from transformers import PreTrainedModel

from spo_kernels.train.loop import Trainer
from tests.processes import Forked, exit_codes, run_module

from .conftest import Fails, Train, Whole, assert_same_weights, read_weights
from .test_resume import OPTIONS

pytestmark = pytest.mark.usefixtures("shared_references")
FINAL = (*OPTIONS, "--save-steps", 0)


def mount(*options: str) -> bool:
    return subprocess.run(["mount", *options], capture_output=True).returncode == 0


class Disk:
    """A small file system whose size can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if shutil.which("mount") is None or not mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)):
            pytest.skip("no permission to mount a small disk")

    def leave(self, kib: int) -> None:
        """Fill it up to so much of free space."""
        free = shutil.disk_usage(self.path).free
        filler = self.path / "filler"
        size = filler.stat().st_size if filler.exists() else 0
        with filler.open("wb") as file:
            file.write(b"x" * max(size + free - (kib << 10), 0))

    def empty(self) -> None:
        (self.path / "filler").unlink()

    def remount(self, options: str) -> None:
        assert mount("-o", f"remount,{options}", str(self.path))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk.path)], check=True)


@pytest.fixture
def spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files."""
    (tmp_path / "spare").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spare"))
    return tmp_path / "spare"


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    original = Trainer._optimizer_step

    def wrapped(self: Trainer) -> Any:
        if self.step == step:
            action()
        return original(self)

    monkeypatch.setattr(Trainer, "_optimizer_step", wrapped)


def test_full_disk_in_the_final_save(
    whole: Whole, fails: Fails, disk: Disk, spare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a checkpoint: the model is kept where there is room."""
    undisturbed = whole(*FINAL)
    at_step(monkeypatch, 8, lambda: disk.leave(64))
    message = fails(*FINAL, output_dir=disk.path / "out")
    (kept,) = spare.iterdir()
    assert "final: can't be written (" in message and f"step 9 is kept in {kept} (model)" in message
    assert {p.name for p in (disk.path / "out").glob(".*")} == {".lock"}
    assert_same_weights(kept, undisturbed)
    assert tf.AutoTokenizer.from_pretrained(kept).eos_token == "</s>"


def test_full_disk_in_the_final_save_after_a_checkpoint(
    train: Train, whole: Whole, fails: Fails, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = whole(*OPTIONS)
    original = Trainer._save

    def save(self: Trainer, due: bool) -> None:
        original(self, due)
        if self.step == 9:
            disk.leave(20)

    monkeypatch.setattr(Trainer, "_save", save)
    output = disk.path / "out"
    message = fails(*OPTIONS, output_dir=output)
    assert f"{output}/checkpoint-9 holds the whole training" in message
    assert not (output / "model.safetensors").exists()
    monkeypatch.undo()
    disk.empty()
    assert train(*OPTIONS, "--resume", output_dir=output) == 0
    assert_same_weights(output, undisturbed)


def test_full_disk_in_a_checkpoint(
    train: Train, whole: Whole, fails: Fails, disk: Disk, spare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = whole(*OPTIONS)
    at_step(monkeypatch, 5, lambda: disk.leave(48))
    output = disk.path / "out"
    message = fails(*OPTIONS, output_dir=output)
    assert "checkpoint-6: can't be written (" in message and "earlier checkpoints are intact; step 6 is kept" in message
    monkeypatch.undo()
    disk.empty()
    assert train(*OPTIONS, "--resume", output_dir=output) == 0
    assert_same_weights(output, undisturbed)


def test_full_disk_in_metrics(fails: Fails, disk: Disk, spare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill() -> None:
        # To the last byte of metrics.jsonl's own page.
        disk.leave(0)
        with pytest.raises(OSError), (disk.path / "out" / "metrics.jsonl").open("ab", buffering=0) as file:
            while file.write(b" "):
                pass

    at_step(monkeypatch, 2, fill)
    message = fails(*FINAL, output_dir=disk.path / "out")
    assert "metrics.jsonl: can't be written (" in message and "No space left" in message
    assert "step 3 is kept in" in message and len(list(spare.iterdir())) == 1


@pytest.mark.parametrize("kib", [0, 4, 8, 12, 40, 100, 200, 400])
def test_disk_that_is_nearly_full_from_the_start(
    train: Train, tmp_path: Path, disk: Disk, spare: Path, capsys: pytest.CaptureFixture[str], kib: int
) -> None:
    disk.leave(kib)
    # where it is without an option: on the disk, not shared
    cache = ("--cache-dir", disk.path / "out" / "reference-cache")
    status = train(*OPTIONS, *cache, output_dir=disk.path / "out")
    error = capsys.readouterr().err
    assert status == 2 and "Traceback" not in error and "can't be" in error
    left = {p.name for p in (disk.path / "out").rglob(".*")} if (disk.path / "out").exists() else set()
    assert left <= {".lock"}


def test_too_little_space_is_said_before_training(
    train: Train, disk: Disk, spare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk.leave(50)
    train(*FINAL, output_dir=disk.path / "out")
    assert "0 MB are free, and the trained model alone takes" in capsys.readouterr().err


def test_read_only_disk(fails: Fails, disk: Disk) -> None:
    (disk.path / "there").mkdir()
    disk.remount("ro")
    for output in (disk.path / "out", disk.path / "there"):
        assert f"--output-dir {output} can't be used: " in fails(output_dir=output)


def test_folder_that_is_removed_during_the_run(
    fails: Fails, whole: Whole, tmp_path: Path, spare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = whole(*FINAL)
    at_step(monkeypatch, 8, lambda: shutil.rmtree(tmp_path / "out"))
    message = fails(*FINAL)
    assert "metrics.jsonl: can't be written (" in message and "step 9 is kept in" in message
    assert_same_weights(next(spare.iterdir()), undisturbed)


def test_reference_cache_that_cannot_be_written(fails: Fails, tmp_path: Path, disk: Disk) -> None:
    disk.remount("ro")
    message = fails("--cache-dir", disk.path / "cache")
    assert f"reference log-probs: {disk.path}/cache/reference-" in message and "Read-only file system" in message


@pytest.mark.parametrize("error", [NotImplementedError("quantised"), TypeError("tokenizer"), OSError(errno.EIO, "I/O")])
def test_model_that_cannot_be_saved(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Its trained weights can."""

    def save(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    message = fails(*FINAL)
    (kept,) = (tmp_path / "out").glob("rescued-*")
    assert str(error) in message and f"step 9 is kept in {kept} (trained weights)" in message
    assert len(load_file(kept / "model.safetensors")) > 10
    assert not list((tmp_path / "out").glob(".final*"))


def test_failed_final_save_leaves_the_model_before_it(
    train: Train, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a finished run that goes on: the files of the first one are whole or replaced, never mixed."""
    options = (*OPTIONS, "--schedule", "constant")
    assert train(*options) == 0
    before = {n: t.clone() for n, t in read_weights(tmp_path / "out").items()}
    original = PreTrainedModel.save_pretrained

    def save(self: Any, folder: Path, **settings: Any) -> None:
        original(self, folder, **settings)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    assert "checkpoint-12 holds the whole training" in fails(*options, "--max-steps", 12, "--resume")
    after = read_weights(tmp_path / "out")
    assert all(bool((after[name] == tensor).all()) for name, tensor in before.items())


@pytest.mark.parametrize("method", ["__init__", "add_scalar", "flush"])
def test_tensorboard_on_a_full_disk(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """A copy of metrics.jsonl: the run goes on without it and says so once."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    methods = {name: lambda *_, **__: None for name in ("__init__", "add_scalar", "flush", "close")}
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = type("SummaryWriter", (), {**methods, method: full})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert train(*FINAL) == 0
    assert capsys.readouterr().err.count("TensorBoard's files can't be written ([Errno 28] No space left") == 1


@pytest.mark.parametrize(
    "refusal", [NotImplementedError("no flock here"), OSError(errno.ENOLCK, "No locks available")], ids=repr
)
def test_file_system_without_locks(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    """Two runs could not be told apart there."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise refusal

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert f"--output-dir {tmp_path / 'out'} can't be used: {refusal}" in fails(*OPTIONS)


@pytest.mark.parametrize("resume", [False, True])
def test_folder_of_a_run_that_is_alive(train: Train, fails: Fails, tmp_path: Path, resume: bool) -> None:
    output = tmp_path / "out"
    if resume:
        assert train(*OPTIONS) == 0
    output.mkdir(exist_ok=True)
    with FileLock(output / ".lock"):
        message = fails(*OPTIONS, *(["--resume"] if resume else []))
    assert f"--output-dir {output} is in use by another run, which holds {output}/.lock" in message
    assert train(*OPTIONS, *(["--resume"] if resume else [])) == 0


def test_the_lock_lasts_until_the_model_is_saved(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    original = PreTrainedModel.save_pretrained

    def save(self: Any, folder: Path, **settings: Any) -> None:
        lock = FileLock(tmp_path / "out" / ".lock", timeout=0)
        try:
            lock.acquire()
        except TimeoutError:
            held.append(True)
        original(self, folder, **settings)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    assert train(*FINAL) == 0 and held == [True]


def test_two_runs_that_start_together(tmp_path: Path, model_dir: Path, pairs_file: Path) -> None:
    """One of them trains, the other gets a sentence, whichever is first."""
    options = ("--model", model_dir, "--dataset", pairs_file, "--quiet", "--output-dir", tmp_path / "out")
    options += ("--max-steps", 4, "--save-steps", 1)
    runs = [Forked(tmp_path, run_module, "spo_kernels.train", *options) for _ in range(2)]
    codes, errors = exit_codes(runs, 200), [run.written[1] for run in runs]
    assert sorted(codes, key=str) == [0, 2], errors
    refused = errors[codes.index(2)]
    assert "is in use by another run" in refused or "is not empty" in refused


def test_foreign_folder_gets_no_lock_file(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    assert "is not empty" in fails()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
