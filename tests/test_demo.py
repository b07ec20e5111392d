"""The demo: its task, tokenizer, scores and failures, and the whole of it with very few steps."""

import json
import random
import runpy
import subprocess
import sys
from itertools import islice
from pathlib import Path

import in_process
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from arithmetic.answers import write_solutions
from arithmetic.model import END, PAD, VOCABULARY, make_tokenizer, save_base
from arithmetic.records import read_jsonl
from arithmetic.task import (
    PROBLEMS,
    SLIPS,
    Problem,
    Slip,
    is_right,
    possible_slips,
    preference_record,
    problems,
    read_answer,
    sft_record,
    solve,
    solve_badly,
)
from benchmarks import run as benchmark
from examples.demo import __main__ as demo
from examples.demo import cost, train
from examples.demo.data import Files, write_data
from examples.demo.evaluate import answer_accuracy, evaluate, response_logps
from spo_kernels.train.cli import main as spo_train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def every_problem():
    return list(problems(random.Random(0)))


@pytest.fixture(scope="module")
def base(tmp_path_factory, every_problem):
    """Folder of a base model with random weights."""
    folder = tmp_path_factory.mktemp("base")
    rng = random.Random(0)
    records = [sft_record(problem, 0.5, rng) for problem in every_problem[:1000]]
    save_base(folder, [text for record in records for text in record.values()], seed=0)
    return folder


def test_every_problem_comes_once(every_problem):
    assert len(set(every_problem)) == len(every_problem) == PROBLEMS
    assert all(10 <= p.b <= 99 and 10 <= p.a <= 99 and p.answer >= 0 for p in every_problem)


def test_right_solutions_are_right(every_problem):
    assert all(is_right(problem, solve(problem)) for problem in every_problem)


def test_bad_solutions_are_wrong_but_well_formed(every_problem):
    rng = random.Random(0)
    for problem in every_problem:
        wrong = solve_badly(problem, rng)
        assert read_answer(wrong) not in (None, problem.answer)
        assert wrong.count("\n") == solve(problem).count("\n")


@pytest.mark.parametrize(
    ("problem", "slip", "text"),
    [
        (Problem(53, 27, "-"), None, "ones 13-7=6 borrow\ntens 4-2=2\nA: 26"),
        (Problem(53, 27, "-"), Slip("forgotten carry", 1), "ones 13-7=6 borrow\ntens 5-2=3\nA: 36"),
        (Problem(53, 27, "-"), Slip("turned around", 0), "ones 7-3=4\ntens 5-2=3\nA: 34"),
        (Problem(53, 27, "-"), Slip("one too few", 1), "ones 13-7=6 borrow\ntens 4-2=1\nA: 16"),
        (Problem(59, 63, "+"), None, "ones 9+3=12 carry\ntens 5+6+1=12 carry\nA: 122"),
        (Problem(59, 63, "+"), Slip("forgotten carry", 1), "ones 9+3=12 carry\ntens 5+6=11 carry\nA: 112"),
        (Problem(54, 35, "+"), Slip("one too many", 0), "ones 4+5=10 carry\ntens 5+3+1=9\nA: 90"),
        (Problem(30, 30, "-"), None, "ones 0-0=0\ntens 3-3=0\nA: 0"),
    ],
)
def test_written_solutions(problem, slip, text):
    assert solve(problem, slip) == text


def test_impossible_slips_are_not_offered():
    offered = possible_slips(Problem(99, 11, "-"))
    assert {slip.kind for slip in offered} == {"one too few", "one too many"}
    # 9 + 9 + 1 is the most that a column holds.
    assert Slip("one too many", 1) not in possible_slips(Problem(99, 99, "+"))


def test_every_kind_of_slip_is_made(every_problem):
    assert {slip.kind for problem in every_problem[:100] for slip in possible_slips(problem)} == set(SLIPS)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("A: 80", 80), ("ones 1+2=3\nA: 7\nA: 9", 7), ("80", None), ("A: ", None), ("A: 8x", None), ("", None)],
)
def test_read_answer(text, answer):
    assert read_answer(text) == answer


def test_data_files(tmp_path):
    settings = {"demonstrations": 200, "pairs": 50, "heldout": 20, "sloppiness": 0.3, "seed": 1}
    first, second = Files(tmp_path / "a"), Files(tmp_path / "b")
    heldout = write_data(first, **settings)
    assert write_data(second, **settings) == heldout
    for path in first.folder.iterdir():
        assert path.read_bytes() == (second.folder / path.name).read_bytes()
    prompts = [
        [record["prompt"] for record in read_jsonl(path)]
        for path in (first.sft, first.preferences, first.heldout_preferences)
    ]
    assert [len(part) for part in prompts] == [200, 50, 20]
    assert len({prompt for part in prompts for prompt in part}) == 270
    assert [problem.prompt for problem in heldout.problems] == prompts[2]
    by_prompt = {p.prompt: p for p in problems(random.Random(0))}
    right = sum(is_right(by_prompt[record["prompt"]], record["completion"]) for record in read_jsonl(first.sft))
    assert 120 <= right <= 160
    assert all(is_right(by_prompt[r["prompt"]], r["completion"]) for r in read_jsonl(first.chosen))
    assert not any(is_right(by_prompt[r["prompt"]], r["rejected"]) for r in read_jsonl(first.preferences))


def test_tokenizer(base, every_problem):
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)
    assert len(tokenizer) <= VOCABULARY
    for problem in every_problem[-200:]:
        prompt, solution = (tokenizer(text)["input_ids"] for text in (problem.prompt, solve(problem)))
        assert tokenizer.decode(prompt + solution) == problem.prompt + solve(problem)
        assert tokenizer(problem.prompt + solve(problem))["input_ids"] == prompt + solution
        digits = sum(c.isdigit() for c in problem.prompt + solve(problem))
        assert sum(tokenizer.decode([i]).isdigit() for i in prompt + solution) == digits
    assert tokenizer.decode(tokenizer("naïve 数 \t\n")["input_ids"]) == "naïve 数 \t\n"
    assert make_tokenizer(["What is 1+1?\n"]).eos_token == END


def test_response_logps(base, every_problem):
    """Batched and padded, against one sequence at a time."""
    rng = random.Random(0)
    pairs = [preference_record(problem, rng) for problem in every_problem[:150]]
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        logps, lengths = response_logps(model, tokenizer, pairs, "rejected")
        for i in (0, 99, 100, 149):
            prompt = tokenizer(pairs[i]["prompt"])["input_ids"]
            response = [*tokenizer(pairs[i]["rejected"])["input_ids"], tokenizer.eos_token_id]
            log_probs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            expected = sum(log_probs[t, token] for t, token in zip(places, response, strict=True))
            assert lengths[i] == len(response)
            torch.testing.assert_close(logps[i], expected, rtol=1e-5, atol=1e-4)


def test_answer_accuracy(monkeypatch, every_problem):
    """Three of four right, over more than one batch."""
    asked = every_problem[:240]
    texts = {p: solve(p) if i % 4 else solve_badly(p, random.Random(i)) for i, p in enumerate(asked)}
    monkeypatch.setattr(
        "examples.demo.evaluate.write_solutions", lambda model, tokenizer, batch, sample: [texts[p] for p in batch]
    )
    assert answer_accuracy(None, None, asked, sample=False) == 0.75


def test_evaluate_random_model(base, every_problem):
    rng = random.Random(0)
    asked = every_problem[:8]
    pairs = [preference_record(problem, rng) for problem in asked]
    scores = evaluate(base, asked, pairs, seed=0)
    assert scores == evaluate(base, asked, pairs, seed=0)
    assert scores.right_greedy == scores.right_sampled == 0
    assert scores.margin == scores.chosen - scores.rejected
    assert scores.chosen < scores.chosen_per_token < -4


def test_write_solutions_leaves_prompt_and_padding_out(base):
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base).eval()
    texts = write_solutions(model, tokenizer, list(islice(problems(random.Random(3)), 3)), sample=True)
    assert len(texts) == 3
    assert not any("What is" in text or PAD in text or END in text for text in texts)


def test_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.txt").touch()
    assert demo.main(["--output-dir", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "data" / "precious.txt").exists()


def test_failing_training_fails_the_demo(tmp_path, monkeypatch, capsys, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads(1)
    monkeypatch.setattr(train.subprocess, "run", lambda command, env: subprocess.CompletedProcess(command, 3))
    small = ["--demonstrations", "50", "--pairs", "8", "--heldout", "4", "--threads", "1"]
    assert demo.main(["--output-dir", str(tmp_path / "out"), *small]) == 1
    assert "failed with exit code 3" in capsys.readouterr().err


def test_failing_measurement_says_why(monkeypatch):
    row = {"variant": "naive", "status": "failed", "reason": "killed by SIGKILL"}
    with pytest.raises(cost.MeasuringFailed, match="measuring naive failed: killed by SIGKILL"):
        cost.cost_of(row)
    with pytest.raises(cost.MeasuringFailed, match=r"exit code 2.*--floor-tile: expected ROWSxCOLUMNS"):
        cost.run_benchmark(["--floor-tile", "4096"])


@pytest.mark.parametrize("option", [["--pairs", "0"], ["--pairs", "12000"], ["--second-stages", "ppo"]])
def test_bad_options(option):
    with pytest.raises(SystemExit, match="2"):
        demo.main(option)


@pytest.fixture
def fewer_processes(monkeypatch, threads):
    """SFT is a process, as a user has it; what the demo starts after it runs in this one."""
    start = subprocess.run

    def run(command, **options):
        module = command[2:3]
        if module == ["benchmarks.run"]:
            benchmark.main(command[3:], in_process.launch)
            return subprocess.CompletedProcess(command, 0, "", "")
        if module == ["spo_kernels.train"] and "preference" in command:
            return subprocess.CompletedProcess(command, spo_train(command[3:]))
        return start(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads(1)


@pytest.mark.usefixtures("fewer_processes")
def test_whole_demo(tmp_path, monkeypatch, capsys):
    """Three steps of each stage; a second run may replace the first one's output."""
    sizes = {"demonstrations": 200, "pairs": 40, "heldout": 10, "sft-steps": 3, "second-steps": 3, "threads": 1}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    options += ["--second-stages", "spo", "--cost-vocab", "512", "--cost-tokens", "64"]
    monkeypatch.delitem(sys.modules, demo.__name__)
    monkeypatch.setattr(sys, "argv", ["demo", "--output-dir", str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("examples.demo", run_name="__main__")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for word in ("$ spo-train", "right answers", "log p(chosen)", "margin", "eager / fused", "plots:"):
        assert word in printed
    for name in ("training", "logps", "answers", "head_cost"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert list(results["scores"]) == ["base", "sft", "spo"]
    assert results["eager"]["milliseconds"] > 0 and results["fused"]["milliseconds"] > 0
    assert results["scores"]["sft"]["chosen"] > results["scores"]["base"]["chosen"]
    demo.prepare_output(tmp_path / "out")
    assert not (tmp_path / "out" / "sft").exists()
