"""`--diagnostics` in runs, and `spo-plot`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from spo_kernels.commands.plot import main
from spo_kernels.extras.diagnostics import summarize
from spo_kernels.losses import PairLogps

from .conftest import Train, Whole, assert_same_weights, read_metrics
from .test_resume import OPTIONS, interrupted, stop_after, without_times
from .test_training import run

__all__ = ["stop_after"]
pytestmark = pytest.mark.usefixtures("shared_references")


def own_logps(folder: Path, pairs_file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [2, n] and lengths of the file's responses, from the model's own logits."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    logps, lengths = torch.zeros(2, len(rows)), torch.zeros(2, len(rows), dtype=torch.int64)
    for i, row in enumerate(rows):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        for k, side in enumerate(("chosen", "rejected")):
            ids = [*tokenizer(row[side], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            tokens = torch.tensor([prompt + ids])
            with torch.no_grad():
                logp = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
            logps[k, i] = logp.gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :, 0].sum()
            lengths[k, i] = len(ids)
    return logps, lengths


@pytest.mark.parametrize(
    "options",
    [("--loss", "dpo"), ("--loss", "simpo"), ("--loss", "dpo", "--reference", "online")],
    ids=["reference", "no reference", "online"],
)
def test_evaluation_against_the_model_itself(
    train: Train, tmp_path: Path, model_dir: Path, pairs_file: Path, options: tuple[Any, ...]
) -> None:
    output = run(train, tmp_path / "out", *options, "--diagnostics", "--eval-dataset", pairs_file)
    before, lengths = own_logps(model_dir, pairs_file)
    after, _ = own_logps(output, pairs_file)
    expected = summarize(PairLogps(*after, *before, *lengths))
    start, *_, end = read_metrics(output, "eval")
    found = {k.removeprefix("diagnostics/"): v for k, v in end.items() if k.startswith("diagnostics/")}
    assert found == {k: pytest.approx(v, rel=1e-3, abs=2e-3) for k, v in expected.items()}
    assert start["diagnostics/chosen_fell/share"] == 0 and abs(start["diagnostics/lost_mass/nats"]) < 1e-3
    assert all("diagnostics/gradient_log_ratio/p50" in r for r in read_metrics(output, "train"))


def test_diagnostics_change_nothing_else(train: Train, tmp_path: Path, pairs_file: Path) -> None:
    plain = run(train, tmp_path / "plain", "--eval-dataset", pairs_file)
    logged = run(train, tmp_path / "logged", "--eval-dataset", pairs_file, "--diagnostics")
    assert_same_weights(plain, logged)
    for a, b in zip(without_times(plain), without_times(logged), strict=True):
        assert a == {k: v for k, v in b.items() if not k.startswith("diagnostics/")}


def test_resumed_run_logs_the_same(train: Train, whole: Whole, tmp_path: Path, stop_after: Any) -> None:
    """Step 5 dies between log lines: the pairs since the last one must survive too."""
    undisturbed = whole(*OPTIONS, "--diagnostics")
    interrupted(train, stop_after, 5, "--diagnostics")
    assert train(*OPTIONS, "--diagnostics", "--resume") == 0
    assert without_times(tmp_path / "out") == without_times(undisturbed)


def plot(*arguments: Any) -> int:
    return main([*map(str, arguments)])


@pytest.fixture(scope="module")
def plotted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plotted")


@pytest.fixture
def two_runs(train: Train, plotted: Path, pairs_file: Path) -> list[Path]:
    """Trained once for all tests that read them."""
    dpo, spo = plotted / "dpo", plotted / "spo"
    if not spo.exists():
        run(train, dpo, "--loss", "dpo", "--diagnostics", "--eval-dataset", pairs_file)
        run(train, spo)
    return [dpo, spo]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot(two_runs: list[Path], tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    first, second = two_runs
    output = tmp_path / f"figure.{ending}"
    assert plot(first, second / "metrics.jsonl", "--output", output) == 0
    content = output.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml") and len(content) > 10_000
    assert plot(first, "--split", "train", "--output", output) == 0


def test_plot_of_runs_of_which_one_has_no_such_metric(
    two_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its panels have the other run's numbers alone, its bars stand over their ticks."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    assert plot(*two_runs, "--output", tmp_path / "figure.png") == 0
    titles = {axes.get_title(): axes for axes in drawn[0].axes if axes.get_visible()}
    for title, axes in titles.items():
        lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 0]
        assert lines and all(isinstance(y, float | int) for line in lines for y in line.get_ydata()), title
    (lost,) = [axes for title, axes in titles.items() if title.startswith("mass that left")]
    assert [len(line.get_xdata()) > 0 for line in lost.get_lines()] == [True, False]
    (bars,) = [axes for title, axes in titles.items() if title.startswith("change of the chosen")]
    for bar in bars.patches:
        centre = bar.get_x() + bar.get_width() / 2
        assert centre == pytest.approx(round(centre))


BAD_METRICS = {
    "not JSON": ("{", "metrics.jsonl:1: not a line of metrics: '{'"),
    "no step": ('{"loss": 1}', "metrics.jsonl:1: not a line of metrics"),
    "a list": ("[1]", "metrics.jsonl:1: not a line of metrics"),
    "NUL": ("\0\0", "metrics.jsonl:1: not a line of metrics"),
    "deep": ("[" * 200_000, "metrics.jsonl:1: not a line of metrics"),
    "number as text": ('{"step": "1", "split": "eval"}', "metrics.jsonl:1: not a line of metrics"),
    "metric as text": ('{"step": 1, "split": "eval", "loss": "low"}', "metrics.jsonl:1: not a line of metrics"),
    "empty": ("", "no lines of split train; it has none"),
}


@pytest.mark.parametrize("name", BAD_METRICS)
def test_plot_of_a_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    pytest.importorskip("matplotlib")
    content, message = BAD_METRICS[name]
    (tmp_path / "metrics.jsonl").write_text(content and content + "\n")
    assert plot(tmp_path, "--output", tmp_path / "o.png") == 2
    assert message in capsys.readouterr().err


def test_plot_errors(two_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert plot(tmp_path / "none.jsonl", "--output", tmp_path / "o.png") == 2
    assert "none.jsonl: can't be read" in capsys.readouterr().err
    assert plot(two_runs[1], "--split", "eval", "--output", tmp_path / "o.png") == 2
    assert "no lines of split eval; it has train" in capsys.readouterr().err
    assert plot(two_runs[0], "--output", tmp_path / "o.doc") == 2
    assert "o.doc can't be written" in capsys.readouterr().err


def test_plot_without_matplotlib(
    two_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot(two_runs[0], "--output", tmp_path / "o.png") == 2
    assert "plotting needs matplotlib: pip install matplotlib" in capsys.readouterr().err
