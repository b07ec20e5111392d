"""The benchmark of accuracy on a model's hidden states, on a tiny model that is saved and loaded."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import real_model
from tests.train.conftest import build_tokenizer, pair, write_jsonl


def test_figures_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [pair(i) for i in range(12)])
    monkeypatch.setattr(real_model, "WINDOW", 8)
    out = tmp_path / "out.json"
    real_model.main(
        ["--model", str(tmp_path), "--pairs", str(pairs), "--count", "9", "--name", "t", "--json", str(out)]
    )
    report = json.loads(out.read_text())
    # the response's words and its end, of the first nine pairs
    assert report["tokens"] == sum(1 + len(pair(i)["chosen"].split()) for i in range(9)) and report["model"] == "t"
    found = report["errors"]
    assert 0 < found["ours"]["token"] < 1e-4 < found["half_logits"]["token"]
    assert found["ours"]["sum"] < 1e-3 < found["half_logits"]["sum"]
    assert capsys.readouterr().out.count("| ") > 6
