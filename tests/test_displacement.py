"""`experiments.displacement`: tiny runs of the whole, its task, and its table."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from arithmetic.task import Problem, is_right, solve
from experiments.displacement import __main__ as program
from experiments.displacement import report, task_arithmetic
from experiments.displacement.methods import CONTROL, FORMS, OBJECTIVES, Method, table
from experiments.displacement.runs import _once
from experiments.displacement.worker import RunFailed, answer_reader
from spo_kernels.train.cli import build_parser
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.config_checks import checked
from spo_kernels.train.objective import build_objective

TINY = ("--seeds", 1, "--objectives", "dpo", "sft", "--demonstrations", 60, "--pairs", 12, "--heldout", 8)
TINY += ("--sft-steps", 2, "--steps", 2, "--learning-rates", 1e-4, "--train-options", "--batch-size 4")


class Inline:
    """A process pool without processes."""

    def __init__(
        self, processes: int, context: Any, initializer: Callable[..., None], arguments: Iterable[Any]
    ) -> None:
        initializer(*arguments)

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, function: Callable[..., Any], *columns: Iterable[Any]) -> Iterator[Any]:
        return map(function, *columns)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the command in this process; returns its results."""
    monkeypatch.setattr(program, "ProcessPoolExecutor", Inline)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def command(name: str, *options: Any) -> dict[str, Any]:
        output = tmp_path / name
        assert program.main([*map(str, options), "--output-dir", str(output)]) == 0
        assert (output / "displacement.png").read_bytes().startswith(b"\x89PNG")
        results = json.loads((output / "results.json").read_text())
        made = [(output / name).read_bytes() for name in ("tables.md", "displacement.png")]
        assert made[0].decode() == report.markdown(results)
        assert program.main(["--render", str(output / "results.json")]) == 0
        assert made == [(output / name).read_bytes() for name in ("tables.md", "displacement.png")]
        return results

    return command


def test_every_task(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The later runs take the first one's SFT model and data: as a user's, and as those of gsm8k."""
    results = run("built-in", *TINY)
    names = ["dpo", "dpo+spo", "dpo+spo-hinge", "dpo+spo-inner", "sft"]
    assert [(r["seed"], r["method"]) for r in results["runs"]] == [(0, name) for name in names]
    assert all(set(report.COLUMNS) < set(r["pairs"]) for r in results["runs"])
    folder = tmp_path / "built-in" / "seed-0"
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 12 and all(p["chosen"] != p["rejected"] for p in pairs)
    answers = [json.loads(line) for line in (folder / "sft-0.0001" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 8 and sum(a["right"] for a in answers) / 8 == results["runs"][-1]["accuracy"]

    few = ("--no-ablation", "--seeds", 1, "--eval-fraction", 0.3, "--steps", 2, "--train-options", "--batch-size 2")
    own = ("--model", folder / "sft", "--dataset", folder / "pairs.jsonl", "--questions", folder / "questions.jsonl")
    again = run("own", *own, *few, "--objectives", "sft", "--max-new-tokens", 8)
    assert [r["method"] for r in again["runs"]] == ["sft"]

    (folder / "preferences.jsonl").write_bytes((folder / "pairs.jsonl").read_bytes())
    real = run("gsm8k", "--task", "gsm8k", "--data", folder, *few, "--sft-steps", 1, "--objectives", "sgdpo")
    assert [r["method"] for r in real["runs"]] == ["sgdpo", "sgdpo+spo"]
    assert report.RANKED in report.markdown(real) and report.GREEDY in report.markdown(results)


def test_resumed_command_keeps_what_is_finished(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert _once(folder, lambda: {"accuracy": 0.5}) == {"accuracy": 0.5}
    assert _once(folder, lambda: {"accuracy": 0.7}) == {"accuracy": 0.5}
    (folder / "result.json").unlink()
    (folder / "half").touch()
    assert _once(folder, lambda: {"accuracy": 0.7}) == {"accuracy": 0.7} and not (folder / "half").exists()

    options = program.parse(["--output-dir", str(tmp_path / "all"), "--resume"])
    program.claim(options)
    options.processes = 7
    program.claim(options)
    options.steps = 7
    for settings in (options, program.parse(["--output-dir", str(tmp_path / "all")])):
        with pytest.raises(RunFailed, match=r"is of another command|is not empty"):
            program.claim(settings)


def test_every_method_is_what_spo_train_accepts() -> None:
    for method in table(list(OBJECTIVES), ablation=True):
        options = vars(
            build_parser().parse_args(["--model", "m", "--dataset", "d", "--output-dir", "o", *method.options])
        )
        config = TrainConfig(**options | {k: tuple(v) for k, v in options.items() if isinstance(v, list)})
        assert build_objective(checked(config)) is not None, method
    assert {Method("dpo", form) for form in FORMS} < set(table(["dpo"], ablation=True))
    assert [m.name for m in table([CONTROL], ablation=True)] == [CONTROL]


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (task_arithmetic.ANSWER_PATTERN, "ones 13-7=6\ntens 4-2=2\nA: 26", "26"),
        (task_arithmetic.ANSWER_PATTERN, "ones 13-7=6\ntens 4", None),
        (program.LAST_MATCH, "first 12, then 1,234 apples.", "1234"),
        (program.LAST_MATCH, "It costs $18.00.", "18"),
        (program.LAST_MATCH, "none", None),
        (r"#### (-?[\d,]+)", "5 + 5 = 10\n#### -1,010", "-1010"),
    ],
)
def test_answers_are_read(pattern: str, text: str, answer: str | None) -> None:
    assert answer_reader(pattern)(text) == answer


def test_right_solutions_are_read_as_right() -> None:
    for problem in (Problem(53, 27, "-"), Problem(99, 99, "+"), Problem(10, 10, "-")):
        text = solve(problem)
        assert is_right(problem, text) and answer_reader(task_arithmetic.ANSWER_PATTERN)(text) == str(problem.answer)


def test_gains_are_paired_by_seed() -> None:
    results = {"sft": [{"seed": 1, "accuracy": 0.5}, {"seed": 0, "accuracy": 0.9}]}
    runs = [{"seed": 0, "accuracy": 0.8}, {"seed": 1, "accuracy": 0.4}]
    assert report.gains(results, runs) == pytest.approx([-10, -10])
    assert report.cell([-10.0, -10.0]) == "-10.0 ± 0.0" and report.cell([0.25], share=True) == "25.0 %"


def test_table_and_figure_of_several_seeds(tmp_path: Path) -> None:
    pairs = dict.fromkeys((*report.COLUMNS, "preferred before", "chosen before"), 0.5)
    methods = [m.name for m in table(["dpo", "simpo"], ablation=False)]
    runs = [
        {"seed": s, "learning rate": r, "method": m, "pairs": pairs, "seconds": 1.0} | {"accuracy": 0.5 + s / 10}
        for s in (0, 1)
        for r in (1e-4, 2e-4)
        for m in methods
    ]
    about = dict.fromkeys(("command", "commit", "machine", "threads", "versions"), "x") | {"methods": {}}
    results = {"about": about, "sft": [{"seed": s, "accuracy": 0.6} for s in (0, 1)], "runs": runs}
    text = report.markdown(results)
    assert "### Learning rate 0.0001" in text and "### Learning rate 0.0002" in text
    assert "| simpo | 60.0 ± 0.0 % | 55.0 ± 7.1 % | 55.0 ± 7.1 % | -5.0 ± 7.1 | -5.0 ± 7.1 | 0.5 ± 0.0 |" in text
    report.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_bad_command(run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (("--model", "m"), "--model and --dataset go together"),
        (("--task", "gsm8k"), "--task gsm8k needs --data"),
        (("--seeds", "0"), "--seeds must be at least 1, got 0"),
        (("--objectives", "ppo"), "invalid choice: 'ppo'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            program.main(list(options))
        assert message in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("")
    assert program.main(["--output-dir", str(tmp_path)]) == 1
    assert "is not empty; give another --output-dir" in capsys.readouterr().err
    few = ("--no-ablation", "--sft-steps", "1", "--train-options", "--beta -1")
    assert program.main([*map(str, TINY), *few, "--output-dir", str(tmp_path / "o")]) == 1
    assert "ended with status 2" in capsys.readouterr().err
