"""Every kind of bad input ends with its own message on stderr, exit status 2 and no traceback."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from spo_kernels.train.data import check_model_name
from spo_kernels.train.errors import TrainError

from .conftest import Fails, Train, build_tokenizer, pair, write_jsonl

GOOD = pair(0)

RECORDS: dict[str, tuple[Any, str]] = {
    "truncated JSON": ('{"prompt": "a", "chosen": "b', "not valid JSON, or cut off: Unterminated string"),
    "not JSON": ("prompt,chosen,rejected", "not valid JSON, or cut off: Expecting value"),
    "not an object": ("[1, 2]", "expected a JSON object with named fields, got list"),
    "missing column": (
        {"prompt": "a", "chosen": "b"},
        "no column 'rejected'; the record has 'prompt', 'chosen'",
    ),
    "number": ({**GOOD, "chosen": 5}, "chosen must be a string or a list of chat messages, got int '5'"),
    "null": ({**GOOD, "rejected": None}, "rejected must be a string or a list of chat messages, got nothing"),
    "empty prompt": ({**GOOD, "prompt": ""}, "prompt is empty"),
    "blank response": ({**GOOD, "rejected": " \n"}, "rejected is empty"),
    "lone surrogate": (json.dumps({**GOOD, "chosen": "\ud800"}), "chosen is not valid Unicode"),
    "no messages": ({**GOOD, "chosen": []}, "chosen is an empty list of messages"),
    "message is text": (
        {**GOOD, "chosen": ["hi"]},
        "chosen[0] must be an object with role and content, got str 'hi'",
    ),
    "message lacks content": (
        {**GOOD, "chosen": [{"role": "assistant"}]},
        "chosen[0].content must be a string, got nothing",
    ),
    "speaker is no text": (
        {**GOOD, "chosen": [{"from": ["gpt"], "value": "x"}]},
        "chosen[0].role must be a string, got list",
    ),
    "tool calls are no list": (
        {**GOOD, "chosen": [{"role": "assistant", "content": "x", "tool_calls": 3}]},
        "chosen[0].tool_calls must be a list of objects, got int '3'",
    ),
    "message with parts": (
        {**GOOD, "chosen": [{"role": "assistant", "content": [{"type": "text"}]}]},
        "chosen[0].content must be a string, got list",
    ),
    "mixed forms": (
        {**GOOD, "chosen": [{"role": "assistant", "content": "x"}]},
        "all columns must be strings, or all chat messages; here prompt is a string, chosen is messages",
    ),
    "sft data": (
        {"prompt": "x", "completion": "y"},
        "no column 'chosen'; the record has 'prompt', 'completion'; records with these are for --stage sft",
    ),
    "conversations": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        "no column 'chosen'; the record has 'messages'; records with these are for --stage sft",
    ),
    "nothing shared": (
        {"chosen": "cat", "rejected": "dog"},
        "no column 'prompt', and chosen and rejected do not begin",
    ),
    "nothing left": (
        {"chosen": "a cat", "rejected": "a cat"},
        "no column 'prompt', and nothing is left of a response",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_bad_record_names_file_and_line(fails: Fails, tmp_path: Path, name: str) -> None:
    record, message = RECORDS[name]
    path = tmp_path / "data.jsonl"
    line = record if isinstance(record, str) else json.dumps(record)
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n{json.dumps(GOOD)}\n")
    assert f"{path}:3: {message}" in fails(dataset=path)


SFT_RECORDS: dict[str, tuple[Any, str]] = {
    "preference data": (
        GOOD,
        "no column 'completion'; the record has 'prompt', 'chosen', 'rejected'; "
        "records with these are for --stage preference",
    ),
    "one message": (
        {"messages": [{"role": "user", "content": "x"}]},
        "messages must be a list of at least two",
    ),
    "last is user": (
        {"messages": [{"role": "user", "content": "x"}] * 2},
        "messages must be a list of at least two, the last with role 'assistant'",
    ),
}


@pytest.mark.parametrize("name", SFT_RECORDS)
def test_bad_sft_record(fails: Fails, tmp_path: Path, name: str) -> None:
    record, message = SFT_RECORDS[name]
    path = write_jsonl(tmp_path / "data.jsonl", [record])
    assert f"{path}:1: {message}" in fails("--stage", "sft", dataset=path)


def test_undecodable_line(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    assert f"{path}:2: not UTF-8 text: invalid start byte" in fails(dataset=path)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("b.jsonl", "\n \n"), ("c.json", "[]")])
def test_empty_file(fails: Fails, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert f"{tmp_path / name}: no records in it" in fails(dataset=tmp_path / name)


def test_cut_json_array(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, GOOD], indent=1)[:-20])
    assert f"{path}: not valid JSON, or cut off" in fails(dataset=path)


def test_record_of_a_json_array_is_numbered(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, {"prompt": "x"}]))
    assert f"{path}: record 2: no column 'chosen'" in fails(dataset=path)


def test_damaged_parquet(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 but not really")
    assert f"{path}: not a readable parquet file" in fails(dataset=path)


def test_missing_file(fails: Fails, tmp_path: Path) -> None:
    assert f"{tmp_path}/none.jsonl: no such file" in fails(dataset=tmp_path / "none.jsonl")
    # before the hub is asked for the model
    assert f"{tmp_path}/none.jsonl: no such file" in fails(model="nobody/nowhere", dataset=tmp_path / "none.jsonl")


def test_unknown_file_type(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("prompt,chosen,rejected")
    assert "unknown file type '.csv'; expected one of .jsonl, .json, .parquet" in fails(dataset=tmp_path / "data.csv")


def test_unknown_hub_data_set(fails: Fails) -> None:
    message = fails(dataset="nobody/no-such-data")
    assert "data set 'nobody/no-such-data', split 'train': can't be loaded" in message
    assert "if a local file was meant, it does not exist" in message


def test_folder_of_files_that_differ(fails: Fails, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    write_jsonl(folder / "b.jsonl", [{"prompt": "a", "answer": "b"}])
    message = fails(dataset=folder)
    assert "can't be loaded (DatasetGenerationError" in message and "answer: string" in message


def test_prompt_over_the_limit(fails: Fails, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD, {**GOOD, "prompt": "say " * 30}])
    message = fails("--max-prompt-length", 20, dataset=path)
    assert f"{path}:2: prompt: " in message and "tokens, over --max-prompt-length 20" in message


def test_response_cut_to_nothing(fails: Fails, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD, {**GOOD, "prompt": "say " * 30}])
    message = fails("--max-length", 20, dataset=path)
    assert f"{path}:2: prompt: " in message and "leave nothing of the response within --max-length 20" in message


def test_nothing_left_after_dropping(fails: Fails) -> None:
    assert "every prompt is over the limit" in fails("--max-length", 2, "--drop-overlong")


def test_sequence_longer_than_the_model(fails: Fails, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{**GOOD, "chosen": "red " * 90}])
    message = fails(dataset=path)
    assert "the longest sequence has" in message and "has only 64 positions; lower --max-length" in message


def test_chat_data_without_a_template(fails: Fails, tmp_path: Path, model_dir: Path) -> None:
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    user = {"role": "user", "content": "x"}
    rows = [{"prompt": [user], "chosen": [user], "rejected": [{**user, "content": "y"}]}]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    message = fails(dataset=path, model=model)
    assert (
        f"{path}:1: the data are chat messages, but the tokenizer has no chat template; take the model's instruct"
        in message
    )


def test_template_that_raises(fails: Fails, tmp_path: Path, model_dir: Path) -> None:
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    user = {"role": "user", "content": "x"}
    rows = [{"prompt": [user], "chosen": [user], "rejected": [{**user, "content": "y"}]}]
    message = fails(dataset=write_jsonl(tmp_path / "chat.jsonl", rows), model=model)
    assert "chat.jsonl:1: the chat template rejects the messages: roles must alternate" in message


def test_value_column_is_needed(fails: Fails, pairs_file: Path) -> None:
    message = fails("--spo-penalty", "hinge", "--spo-value", "input")
    assert f"{pairs_file}:1: spo_value must be a finite number (the loss's input spo_value" in message
    assert message.endswith("got nothing\n")


OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "unknown loss": (
        ("--loss", "ppo"),
        "--loss ppo: loss = 'ppo' is unknown (did you mean 'sppo'?); expected one of ada_dpo, ",
    ),
    "unknown base": (("--base-loss", "ppo"), "loss = 'ppo' is unknown"),
    "unknown field": (("--loss-arg", "gamma=1"), "has no hyperparameter gamma; it has base, beta"),
    "bad field": (("--loss-arg", "gamma"), "--loss-arg must be KEY=VALUE, got 'gamma'"),
    "bad beta": (("--beta", -1), "beta must be a positive number, got -1.0"),
    "bad penalty": (("--spo-penalty", "l2"), "penalty must be one of 'nll', 'hinge', got 'l2'"),
    "spo options for dpo": (
        ("--loss", "dpo", "--spo-weight", 1),
        "--loss dpo takes no --base-loss or --spo- options, got --spo-weight",
    ),
    "batch size": (("--batch-size", 0), "--batch-size must be at least 1, got 0"),
    "learning rate": (("--learning-rate", "nan"), "--learning-rate must be at least 0, got nan"),
    "fraction": (("--eval-fraction", 1), "--eval-fraction must be at least 0 and below 1, got 1.0"),
    "tiny fraction": (("--eval-fraction", 0.001), "--eval-fraction 0.001 of"),
    "prompt limit": (("--max-prompt-length", 1024), "--max-prompt-length 1024 leaves no room for a response"),
    "two eval sets": (("--eval-fraction", 0.1, "--eval-dataset", "x.jsonl"), "exclude each other"),
    "sft reference": (
        ("--stage", "sft", "--ref-model", "x", "--layout", "padded", "--loss-arg", "a=1"),
        "--stage sft has no pairs, no preference loss and no reference: --ref-model, --loss-arg, --layout would not be",
    ),
    "sft loss": (("--stage", "sft", "--loss", "dpo"), "no reference: --loss would not be read; leave it out, or train"),
    "unread reference": (
        ("--loss", "simpo", "--ref-model", "x"),
        "--loss simpo has no reference: --ref-model would not",
    ),
    "backend": (("--backend", "tpu"), "--backend tpu: unknown; the backends are torch, cpp"),
    "not a number": (("--batch-size", "many"), "argument --batch-size: invalid int value: 'many'"),
    "not a choice": (("--stage", "rl"), "argument --stage: invalid choice: 'rl'"),
    "unknown option": (("--learning_rat", 1), "arguments: --learning_rat (did you mean --learning-rate?)"),
    "others' lr": (("--lr", 1), "unrecognized arguments: --lr (did you mean --learning-rate?)"),
    "others' loss": (("--loss-type=dpo",), "unrecognized arguments: --loss-type (did you mean --loss?)"),
    "others' batch": (("--per_device_train_batch_size", 1), "(did you mean --batch-size?)"),
    "underscores": (("--batch_size", 1), "--batch_size (did you mean --batch-size?)"),
    "two unknown": (("--lr", 1, "--zzz", 2), "--lr (did you mean --learning-rate?), --zzz (--help lists"),
    # before data are encoded, or even looked for
    "float16": (("--dtype", "float16", "--dataset", "nowhere"), "--dtype float16: gradients underflow in it"),
    "lora without a rank": (("--lora-alpha", 8), "--lora-alpha: of adapters; give their rank, --lora-r, or leave it"),
    "no lora target": (("--lora-r", 2, "--lora-targets", " , "), "--lora-targets must name modules of the model"),
    "lora target": (
        ("--lora-r", 2, "--lora-targets", "q_proj,qproj"),
        "--lora-targets qproj: LlamaForCausalLM has no module of that name; its linear ones are q_proj, k_proj",
    ),
    "dtype": (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
    "attention": (("--attn-implementation", "none"), 'attn_implementation="none"` is not supported'),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_option(fails: Fails, name: str) -> None:
    options, message = OPTIONS[name]
    assert message in fails(*options)


def test_help_explains_every_option() -> None:
    from spo_kernels.train.cli import build_parser

    for action in build_parser()._actions:
        assert action.help and len(action.help) > 10, action.option_strings


def test_missing_option(capsys: pytest.CaptureFixture[str]) -> None:
    from spo_kernels.train.cli import main

    with pytest.raises(SystemExit, match="2"):
        main(["--model", "m"])
    assert "the following arguments are required: --dataset, --output-dir" in capsys.readouterr().err


def test_missing_packages(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "spo_kernels.train.run", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert "training needs more packages: pip install transformers datasets accelerate peft" in fails()


def test_backend_of_the_environment(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPO_BACKEND", "abacus")
    assert "the fused loss can't run: SPO_BACKEND = 'abacus' is not a backend" in fails()


def test_unknown_model(fails: Fails) -> None:
    assert "tokenizer of 'nobody/no-such-model' can't be loaded" in fails(model="nobody/no-such-model")


@pytest.mark.parametrize(
    ("name", "words"),
    [("no/such/folder", "no such folder"), ("a-file", "is a file, not"), ("empty", "no config.json or adapter_config")],
)
@pytest.mark.parametrize("option", ["--model", "--ref-model"])
def test_path_without_a_model(fails: Fails, tmp_path: Path, option: str, name: str, words: str) -> None:
    (tmp_path / "a-file").touch()
    (tmp_path / "empty").mkdir()
    path = tmp_path / name
    assert f"model '{path}'" in (message := fails(option, path)) and words in message


def test_paths_are_told_from_hub_ids() -> None:
    for path in ("no-such-folder/", "./no-such-folder", "no/such/folder"):
        with pytest.raises(TrainError, match="no such folder"):
            check_model_name(path)
    for name in ("no-such-model", "nobody/no-such-model"):
        check_model_name(name)


def test_unknown_reference_model(fails: Fails) -> None:
    assert "model 'nobody/no-such-model' can't be loaded" in fails("--ref-model", "nobody/no-such-model")


def test_damaged_model(fails: Fails, tmp_path: Path, model_dir: Path) -> None:
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    (model / "model.safetensors").write_bytes(b"half a file")
    assert f"model '{model}' can't be loaded" in fails(model=model)


def test_misspelt_required_option(capsys: pytest.CaptureFixture[str]) -> None:
    from spo_kernels.train.cli import main

    with pytest.raises(SystemExit, match="2"):
        main(["--modell", "m", "--dataset", "d", "--output-dir", "o"])
    assert "unrecognized arguments: --modell (did you mean --model?)" in capsys.readouterr().err


def test_encoder_decoder(fails: Fails, tmp_path: Path, tokenizer: Any) -> None:
    tf.T5Config(vocab_size=300, d_model=16, num_layers=1, num_heads=2, d_ff=16).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    assert "an encoder-decoder model (t5); only decoders can be trained" in fails(model=tmp_path / "t5")


def test_tokenizer_larger_than_the_model(fails: Fails, tmp_path: Path, model_dir: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "small")
    build_tokenizer().save_pretrained(tmp_path / "small")
    message = fails(model=tmp_path / "small")
    assert "the tokenizer produces token id" in message and "has only 100 tokens" in message


def test_tokenizer_without_an_end(fails: Fails, tmp_path: Path, model_dir: Path) -> None:
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    assert "has no end-of-sequence token" in fails(model=model)


def test_head_adapter(fails: Fails) -> None:
    pytest.importorskip("peft")
    assert "the head, which is tied to the embeddings" in fails("--lora-r", 2, "--lora-targets", "lm_head")


def test_output_dir_is_in_use(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    assert "is not empty; give another, or --resume" in fails()
    assert "--resume: " in fails("--resume") and "holds no run" in fails("--resume")


def test_output_dir_is_a_file(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "is not a folder" in fails()


def test_diverged_loss_stops_the_run(fails: Fails, train: Train, tmp_path: Path, model_dir: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e38)
    model.save_pretrained(tmp_path / "broken")
    build_tokenizer().save_pretrained(tmp_path / "broken")
    message = fails("--loss-arg", "reference_free=true", model=tmp_path / "broken")
    assert "the loss became" in message or "differ from its own logits" in message
