"""Every registered objective on the command line; per-pair inputs; running statistics in checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spo_kernels.losses import LOSSES, build_loss
from spo_kernels.losses.needs import needs_inputs
from spo_kernels.losses.pairs import token_outputs_of
from spo_kernels.losses.state import has_state

from .conftest import Fails, Train, Whole, assert_close_weights, assert_same_weights, read_metrics, write_jsonl
from .test_resume import OPTIONS, interrupted, stop_after, without_times
from .test_training import run

__all__ = ["stop_after"]
pytestmark = pytest.mark.usefixtures("shared_references")
STATEFUL = [name for name in LOSSES if has_state(build_loss(name))]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory, pairs_file: Path) -> Path:
    """The pairs with every input that an objective reads, and a score margin."""
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    names = {name for loss in LOSSES for name in needs_inputs(build_loss(loss))}
    numbers = [{**dict.fromkeys(names, 0.25), "score_margin": i / 10} for i in range(len(rows))]
    folder = tmp_path_factory.mktemp("numbered")
    return write_jsonl(folder / "numbered.jsonl", [{**r, **n} for r, n in zip(rows, numbers, strict=True)])


def reference_of(loss: str) -> tuple[str, ...]:
    """Whole distributions of the reference can't be precomputed."""
    online = "kl" in token_outputs_of(build_loss(loss))
    return ("--reference", "online") if online else ()


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_objective_trains(train: Train, tmp_path: Path, numbered: Path, loss: str) -> None:
    options = ("--loss", loss, "--max-steps", 2, "--learning-rate", 1e-4, *reference_of(loss))
    output = run(train, tmp_path / "out", *options, dataset=numbered)
    assert len(read_metrics(output, "train")) == 2


@pytest.mark.parametrize("loss", ["odpo", "simpo", "tdpo", "wpo"])
def test_spo_wraps_other_objectives(train: Train, tmp_path: Path, numbered: Path, loss: str) -> None:
    options = ("--base-loss", loss, "--max-steps", 1, *reference_of(loss))
    output = run(train, tmp_path / "out", *options, dataset=numbered)
    assert len(read_metrics(output, "train")) == 1


def test_inputs_come_from_columns(train: Train, tmp_path: Path, numbered: Path, pairs_file: Path) -> None:
    """ODPO without offset is DPO; with one, or with another column in its place, it is not."""
    rows = [{**json.loads(line), "offset": 0.0} for line in pairs_file.read_text().splitlines()]
    zero = write_jsonl(tmp_path / "none.jsonl", rows)
    none = run(train, tmp_path / "none", "--loss", "odpo", "--backend", "torch", dataset=zero)
    # the torch backend has no kernel for DPO, which rounds otherwise
    dpo = run(train, tmp_path / "dpo", "--loss", "dpo", "--backend", "torch")
    assert_same_weights(none, dpo)
    losses = {}
    for column in ("offset", "score_margin"):
        options = ("--loss", "odpo", "--pair-input", f"offset={column}", "--batch-size", 48, "--max-steps", 1)
        output = run(train, tmp_path / column, *options, dataset=numbered)
        (record,) = read_metrics(output, "train")
        losses[column] = record["loss"]
    # policy and reference are equal, so each margin is minus the offset
    softplus = torch.nn.functional.softplus
    assert losses["offset"] == pytest.approx(softplus(torch.tensor(0.25)).item(), rel=1e-4)
    assert losses["score_margin"] == pytest.approx(softplus(torch.arange(48) / 10).mean().item(), rel=1e-4)


INPUT_ERRORS: dict[str, tuple[tuple[Any, ...], str]] = {
    "missing column": (("--loss", "odpo"), ":1: offset must be a finite number (the loss's input offset"),
    "other column": (("--loss", "odpo", "--pair-input", "offset=gap"), ":1: gap must be a finite number"),
    "unknown input": (
        ("--loss", "dpo", "--pair-input", "offset=x"),
        "the loss reads no input 'offset'; it reads: none",
    ),
    "wrong input": (("--loss", "odpo", "--pair-input", "of=x"), "the loss reads no input 'of'; it reads: offset"),
    "no column": (("--loss", "odpo", "--pair-input", "offset"), "--pair-input must be NAME=COLUMN, got 'offset'"),
    "sft": (("--stage", "sft", "--pair-input", "offset=x"), "--pair-input would not be read; leave it out"),
    "bad hyperparameter": (("--loss", "simpo", "--loss-arg", "gamma=-1"), "--loss simpo: gamma must be"),
    "text for a number": (("--loss", "simpo", "--loss-arg", "gamma=much"), "--loss simpo: gamma must be"),
    "whole distributions": (("--loss", "tdpo"), "--loss tdpo compares whole distributions with the reference's"),
    "no beta": (("--loss", "sft", "--beta", 1), "--loss sft: loss 'sft' has no hyperparameter beta"),
}


@pytest.mark.parametrize("name", INPUT_ERRORS)
def test_bad_input_or_hyperparameter(fails: Fails, name: str) -> None:
    options, message = INPUT_ERRORS[name]
    assert message in fails(*options)


def test_changed_input_is_other_data(train: Train, fails: Fails, numbered: Path, tmp_path: Path) -> None:
    options = ("--loss", "odpo", "--max-steps", 1, "--save-steps", 1)
    rows = [json.loads(line) for line in numbered.read_text().splitlines()]
    changing = write_jsonl(tmp_path / "changing.jsonl", rows)
    assert train(*options, dataset=changing) == 0
    write_jsonl(changing, [{**row, "offset": 1.0} for row in rows])
    assert "data content was" in fails(*options, "--resume", dataset=changing)


@pytest.mark.parametrize(
    ("loss", "wrapped"),
    [*((name, False) for name in STATEFUL), (STATEFUL[0], True)],
    ids=[*STATEFUL, f"{STATEFUL[0]} inside spo"],
)
def test_running_statistics_resume(
    train: Train, whole: Whole, tmp_path: Path, stop_after: Any, numbered: Path, loss: str, wrapped: bool
) -> None:
    options = ("--base-loss", loss) if wrapped else ("--loss", loss)
    undisturbed = whole(*OPTIONS, *options, dataset=numbered)
    interrupted(train, stop_after, 5, *options, dataset=numbered)
    state = torch.load(tmp_path / "out" / "checkpoint-4" / "state.pt", weights_only=True)
    assert state["processes"][0]["objective"]
    assert train(*OPTIONS, *options, "--resume", dataset=numbered) == 0
    assert without_times(tmp_path / "out") == without_times(undisturbed)
    assert_same_weights(tmp_path / "out" / "checkpoint-9", undisturbed / "checkpoint-9")


def test_there_are_objectives_with_state() -> None:
    assert STATEFUL


def test_ld_alpha_of_1_is_dpo(train: Train, tmp_path: Path) -> None:
    # the torch backend has no kernel for DPO, which rounds otherwise and knows no token weights
    options = ("--loss", "dpo", "--backend", "torch")
    dpo = run(train, tmp_path / "dpo", *options)
    assert_close_weights(dpo, run(train, tmp_path / "one", *options, "--ld-alpha", 1), atol=1e-6)


def test_ld_alpha_weighs_policy_and_reference(train: Train, tmp_path: Path) -> None:
    """Precomputed and online references agree, start at margin 0, and differ from plain DPO's."""
    options = ("--loss", "dpo", "--ld-alpha", 0.3, "--eval-fraction", 0.25)
    cached = run(train, tmp_path / "cached", *options)
    online = run(train, tmp_path / "online", *options, "--reference", "online")
    assert read_metrics(cached, "eval")[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    for a, b in zip(read_metrics(cached), read_metrics(online), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["logps/rejected"] == pytest.approx(b["logps/rejected"], abs=1e-3)
    plain = run(train, tmp_path / "plain", "--loss", "dpo", "--eval-fraction", 0.25, "--cache-dir", cached / "cache")
    assert read_metrics(plain, "eval")[0]["logps/rejected"] < read_metrics(cached, "eval")[0]["logps/rejected"] - 1
    assert read_metrics(plain)[-1]["loss"] != pytest.approx(read_metrics(cached)[-1]["loss"], abs=1e-3)


def test_ld_alpha_and_inner_steps(train: Train, tmp_path: Path) -> None:
    """The value weighs tokens as the loss does: after a step of no size the hinge is at its edge, and adds nothing."""
    hinge = ("--spo-penalty", "hinge", "--spo-inner-steps", 1, "--spo-inner-lr", 1e-9, "--spo-normalization", "sum")
    spo = run(train, tmp_path / "spo", *hinge, "--ld-alpha", 0.3, "--batch-size", 48, "--max-steps", 1)
    dpo = run(train, tmp_path / "dpo", "--loss", "dpo", "--ld-alpha", 0.3, "--batch-size", 48, "--max-steps", 1)
    assert read_metrics(spo, "train")[0]["loss"] == pytest.approx(read_metrics(dpo, "train")[0]["loss"], abs=1e-4)


def test_bad_ld_alpha(fails: Fails) -> None:
    assert "--ld-alpha must be at least 0, got -0.5" in fails("--ld-alpha", -0.5)
    assert "--ld-alpha would not be read" in fails("--stage", "sft", "--ld-alpha", 0.5)
