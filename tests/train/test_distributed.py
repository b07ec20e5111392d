"""Two processes compute what one process computes on the same global batch."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Forked, exit_codes, run_module, torchrun

from .conftest import Train, assert_close_weights, assert_same_weights, read_metrics
from .ranks import WATCHDOG

OPTIONS = ("--max-steps", 4, "--learning-rate", 1e-2, "--logging-steps", 1, "--eval-fraction", 0.3, "--save-steps", 2)
ONE = ("--batch-size", 4, "--grad-accum", 2)
TWO = ("--batch-size", 2, "--grad-accum", 2)
# inner steps are averaged over processes; alpha_dpo_code has running statistics over the pairs of all of them
RUNS: dict[str, tuple[Any, ...]] = {
    "spo": (),
    "inner": ("--spo-penalty", "hinge", "--spo-inner-steps", 2, "--spo-inner-lr", 0.02, "--diagnostics"),
    "state": ("--loss", "alpha_dpo_code", "--beta", 1.0),
    "sft": ("--stage", "sft"),
    # forwards of different numbers of pairs, and more of them on one process than on the other
    "tokens": ("--tokens-per-batch", 26),
}
RESUMED = ("spo", "state", "tokens")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, pairs_file: Path, sft_file: Path) -> Path:
    """A folder with the output of every run on two processes, and of RESUMED again from the middle."""
    folder = tmp_path_factory.mktemp("two")

    def job(name: str, output: Path, *more: Any, continues: Path | None = None) -> dict[str, Any]:
        data = sft_file if name == "sft" else pairs_file
        options = ("--quiet", "--model", model_dir, "--dataset", data, "--output-dir", output)
        arguments = [*options, *RUNS[name], *OPTIONS, *TWO, *more]
        return {"arguments": list(map(str, arguments)), "continues": continues and str(continues)}

    jobs = [job(name, folder / name) for name in RUNS]
    jobs += [job(name, folder / f"{name}-again", "--resume", continues=folder / name) for name in RESUMED]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    # as torchrun says it, which imports everything once more; test_fsdp.py has a launcher of its own
    ranks = [
        Forked(folder, run_module, "tests.train.ranks", folder / "jobs.json", ACCELERATE_USE_CPU="true", **variables)
        for variables in torchrun(2)
    ]
    assert exit_codes(ranks, WATCHDOG + 60) == [0, 0], [rank.written for rank in ranks]
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(train: Train, sft_file: Path, tmp_path: Path, two: Path, name: str) -> None:
    assert train(*RUNS[name], *OPTIONS, *ONE, dataset=sft_file if name == "sft" else None) == 0
    identity = json.loads((two / name / "checkpoint-4" / "checkpoint.json").read_text())["identity"]
    assert identity["number of processes"] == 2
    assert_close_weights(tmp_path / "out", two / name, atol=3e-4)
    one, other = read_metrics(tmp_path / "out"), read_metrics(two / name)
    assert [(r["split"], r["step"]) for r in one] == [(r["split"], r["step"]) for r in other]
    for a, b in zip(one, other, strict=True):
        # in an evaluation each process takes inner steps on its own batches, of other pairs
        if name != "inner" or a["split"] == "train":
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        for key in (k for k in a if k.startswith("diagnostics/") and "fell" not in k):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-3)
        # Adam hides a wrong scale of the loss; the norm shows it.
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-3)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_in_the_middle(two: Path, name: str) -> None:
    """Two processes end with the same bits again."""
    assert_same_weights(two / name, two / f"{name}-again")
    assert len(read_metrics(two / name)) == len(read_metrics(two / f"{name}-again"))
