"""A signal ends a run after its step, with everything saved; kills at any moment lose nothing either."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spo_kernels.train import checkpoint
from spo_kernels.train.cli import main
from spo_kernels.train.loop import Trainer
from spo_kernels.train.signals import StopSignals
from tests.processes import Forked, exit_codes, torchrun

from .conftest import ENVIRONMENT, Train, Whole, assert_same_weights, read_metrics
from .test_resume import OPTIONS, without_times

SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
# One moment in the tests; `SPO_KILLS=12` for a thorough run.
KILLS = int(os.environ.get("SPO_KILLS", "1"))


def allow_signals() -> list[int]:
    """A test runner in the background, or under nohup, ignores some, and its children would too; those it ignored."""
    numbers = [getattr(signal, name) for name in SIGNALS]
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    return ignored


@pytest.fixture(autouse=True)
def allowed() -> Iterator[None]:
    """Also for runs in this process, and programs that it starts."""
    ignored = allow_signals()
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def start(*options: Any, program: tuple[str, ...]) -> Any:
    command = [sys.executable, *program, *map(str, options)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def signal_in(monkeypatch: pytest.MonkeyPatch, method: str, step: int, name: str = "SIGTERM") -> None:
    """The signal comes in the middle of a method, in the given step."""
    original = getattr(Trainer, method)

    def wrapped(self: Trainer, *arguments: Any) -> Any:
        if self.step == step:
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, method, wrapped)


@pytest.mark.parametrize(("name", "save_steps"), [*((name, 2) for name in SIGNALS), ("SIGTERM", 0)])
def test_signal_finishes_the_step_and_saves(
    train: Train,
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    save_steps: int,
) -> None:
    options = (*OPTIONS, "--save-steps", save_steps)
    undisturbed = whole(*options)
    # Into a step between those that are logged and saved.
    signal_in(monkeypatch, "_optimizer_step", 4, name)
    assert train(*options) == SIGNALS[name]
    error = capfd.readouterr().err
    assert f"spo-train: {name}: finishing the step and saving; a second signal leaves at once" in error
    assert f"{name}: stopped after step 5 of 9, which is saved; the same command with --resume goes on" in error
    assert not (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.undo()
    assert train(*options, "--resume") == 0
    said = capfd.readouterr().err
    assert "going on from step 5 of 9" in said and f"model and tokenizer are in {tmp_path / 'out'}" in said
    assert_same_weights(tmp_path / "out", undisturbed)
    assert without_times(tmp_path / "out") == without_times(undisturbed)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # the signal's checkpoint does not outlive a run that keeps none, from which it would begin anew
    assert bool(list((tmp_path / "out").glob("checkpoint-*"))) == bool(save_steps)
    assert train(*options, "--resume") == (0 if save_steps else 2)
    refused = "holds the model of a run that has ended, and no checkpoint to go on from (--save-steps 0)"
    assert (refused in capfd.readouterr().err) == (not save_steps)


@pytest.mark.parametrize("step", [0, 3, 9])
def test_signal_in_an_evaluation(
    train: Train,
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
) -> None:
    """It is broken off and done again by the resumed run, whose checkpoint says so."""
    undisturbed = whole(*OPTIONS)
    signal_in(monkeypatch, "_evaluate", step)
    assert train(*OPTIONS) == 143
    expected = f"stopped after step {step} of 9" if step else "stopped before the first step of this run"
    assert expected in capsys.readouterr().err
    assert step not in [r["step"] for r in (read_metrics(tmp_path / "out", "eval") if step else [])]
    monkeypatch.undo()
    assert train(*OPTIONS, "--resume") == 0
    assert_same_weights(tmp_path / "out", undisturbed)
    assert without_times(tmp_path / "out") == without_times(undisturbed)


def test_signal_in_the_final_save(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is complete, and so is the model."""
    from spo_kernels.train import output

    original = output._write_model

    def write(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(*arguments)

    monkeypatch.setattr(output, "_write_model", write)
    assert train(*OPTIONS) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_signal_while_a_model_is_loaded(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spo_kernels.train import run

    monkeypatch.setattr(run, "load_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGHUP))
    assert train(*OPTIONS) == 129
    assert "SIGHUP: stopped before the first step of this run" in capsys.readouterr().err


def test_ignored_signal_stays_ignored(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_in(monkeypatch, "_optimizer_step", 4, "SIGHUP")
        assert train(*OPTIONS) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def second_signal(*options: str) -> None:
    allow_signals()

    def step(self: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise SystemExit("still here")

    Trainer._optimizer_step = step  # type: ignore[method-assign]
    sys.exit(main(list(options)))


def test_second_signal_leaves_at_once(tmp_path: Path, model_dir: Path, pairs_file: Path) -> None:
    options = ("--model", model_dir, "--dataset", pairs_file, "--output-dir", tmp_path / "out", "--quiet")
    process = Forked(tmp_path, second_signal, *map(str, options))
    assert exit_codes([process], 100) == [130]
    error = process.written[1]
    assert "SIGINT: left at once; the newest checkpoint is whole" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "name, program, seconds",
    [
        ("SIGINT", "-m spo_kernels.train", 0.5),
        ("SIGTERM", "spo-train", 0.5),
        ("SIGHUP", "-m spo_kernels.train", 2.0),
        ("SIGINT", "spo-train", 2.0),
    ],
)
def test_signal_in_the_first_seconds(tmp_path: Path, name: str, seconds: float, program: str) -> None:
    """During the imports. Python itself needs some 0.05 s before it runs the first line of ours."""
    options = ("--model", "m", "--dataset", "d", "--output-dir", tmp_path / "out")
    # What pip installs as the command.
    script = tmp_path / "spo-train"
    script.write_text("import sys\nfrom spo_kernels.train.cli import main\nsys.exit(main())\n")
    process = start(*options, program=(str(script),) if program == "spo-train" else tuple(program.split()))
    time.sleep(seconds)
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=100)
    if process.returncode != 2:
        assert process.returncode == SIGNALS[name], error
        assert f"spo-train: {name}: stopped before the first step" in error
    assert "Traceback" not in error


STEPS = 60 if KILLS > 1 else 20


def train_in_a_fork(*options: str) -> None:
    allow_signals()
    sys.exit(main(list(options)))


def killed_in_a_save(step: int, *options: str) -> None:
    """With half of the file written."""
    original = torch.save

    def save(state: Any, path: Any) -> None:
        original(state, path)
        if f"checkpoint-{step}" in str(path):
            with open(path, "r+b") as file:
                file.truncate(100)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.torch.save = save
    train_in_a_fork(*options)


RUN = ("--max-steps", STEPS, "--save-steps", 5, "--batch-size", 4, "--learning-rate", 1e-3, "--quiet")
RUN += ("--eval-fraction", 0.2, "--loss", "dpo")


@pytest.fixture
def options(model_dir: Path, pairs_file: Path) -> tuple[Any, ...]:
    return (*RUN, "--model", model_dir, "--dataset", pairs_file)


def finish(train: Train, folder: Path, whole: Path) -> None:
    """Resume to the end: the same bits, and nothing left of what the kill interrupted."""
    assert train(*RUN, "--resume", output_dir=folder) == 0
    assert_same_weights(folder, whole)
    assert without_times(folder) == without_times(whole)
    assert {p.name for p in folder.glob(".*")} == {".lock"}


def interrupt(folder: Path, how: str, draw: random.Random, *options: Any) -> None:
    """Start or resume a run, and end it during a save, or by a signal at a random moment after the first step."""
    before = len(read_metrics(folder)) if (folder / "metrics.jsonl").exists() else 0
    arguments = [*map(str, options), "--output-dir", str(folder)]
    if how == "save":
        step = 5 * draw.randrange(1, STEPS // 5 + 1)
        assert exit_codes([Forked(folder.parent, killed_in_a_save, step, *arguments)], 200) == [-signal.SIGKILL]
        assert list(folder.glob(f".checkpoint-{step}.*.tmp"))
        return
    process = Forked(folder.parent, train_in_a_fork, *arguments)
    process.start()
    while process.is_alive() and not (folder / "metrics.jsonl").exists():
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 3.0 if before else 1.0))
    if process.is_alive():
        os.kill(process.pid, getattr(signal, how))
    process.join(100)
    # 0: it had finished; -15: before the first line of ours ran
    assert process.exitcode in (0, -getattr(signal, how), SIGNALS.get(how)), process.written[1]


def test_kills_and_signals(train: Train, tmp_path: Path, options: tuple[Any, ...]) -> None:
    """One run that is killed in a save, ended by SIGTERM and, in the thorough form, by SIGKILL at random moments."""
    assert train(*RUN, output_dir=tmp_path / "whole") == 0
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    for number in range(KILLS):
        folder, draw = tmp_path / str(number), random.Random(seed + number)
        interrupt(folder, "save", draw, *options)
        for how in ("SIGTERM", "SIGKILL")[: min(KILLS, 2)]:
            interrupt(folder, how, draw, *options, "--resume")
        finish(train, folder, tmp_path / "whole")


def test_other_programs_keep_their_signals() -> None:
    """An import of the package, also of its trainer, changes nothing."""
    code = (
        "import signal, spo_kernels.train.cli; "
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler; "
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL"
    )
    process = start(program=("-c", code))
    _, error = process.communicate(timeout=100)
    assert process.returncode == 0, error


def test_leftovers_of_kills_are_removed(train: Train, tmp_path: Path) -> None:
    assert train(*OPTIONS) == 0
    output = tmp_path / "out"
    for name in (".checkpoint-4.old", ".checkpoint-6.99.old", ".checkpoint-8.99.tmp"):
        (output / name).mkdir()
        (output / name / "model.safetensors").write_bytes(b"half")
    (output / ".metrics.jsonl.77.tmp").write_text("half")
    (output / "reference-cache" / ".reference-ab.safetensors.99.tmp").write_text("half")
    (output / ".notes").write_text("the user's own")
    assert train(*OPTIONS, "--resume") == 0
    assert {p.name for p in output.glob(".*")} == {".lock", ".notes"}
    assert not list((output / "reference-cache").glob(".*"))


def test_workers_leave_at_once() -> None:
    """A pool waits for workers that it has sent SIGTERM: one that kept a handler for it may never look."""
    with StopSignals():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def signalled_on_rank_1(*options: str) -> None:
    original = Trainer._optimizer_step

    def step(self: Trainer) -> Any:
        if self.step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    Trainer._optimizer_step = step  # type: ignore[method-assign]
    train_in_a_fork(*options)


def test_signal_to_one_of_two_processes_stops_both(tmp_path: Path, model_dir: Path, pairs_file: Path) -> None:
    """They leave after the same step, whichever got it."""
    options = ("--model", model_dir, "--dataset", pairs_file, "--output-dir", tmp_path / "out", "--max-steps", 9)
    arguments = [*map(str, options), "--quiet", "--eval-fraction", "0.2"]
    ranks = [
        Forked(tmp_path, signalled_on_rank_1, *arguments, ACCELERATE_USE_CPU="true", **variables)
        for variables in torchrun(2)
    ]
    codes = exit_codes(ranks, 200)
    error = "".join(rank.written[1] for rank in ranks)
    assert codes == [143, 143], error
    assert error.count("stopped after step 4 of 9") == 1
    assert (tmp_path / "out" / "checkpoint-4" / "checkpoint.json").exists()
