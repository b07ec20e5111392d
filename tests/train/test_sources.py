"""Where records come from and what they are called: files, folders, hub-like data sets, columns; what is not used."""

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from spo_kernels.data import DataError, Encoding, as_records, encode, frozen, read_records
from spo_kernels.train import data as train_data

from .conftest import Fails, Train, build_tokenizer, pair, read_metrics, write_jsonl
from .templates import LLAMA3, TOOLS, build_chat_tokenizer
from .test_encode import assistant, encode_one, encode_rows, scored_ids, user

ROWS = [pair(i) for i in range(12)]
CALL = {"type": "function", "function": {"name": "say", "arguments": {"w": "red"}}}


def one_step(train: Train, *options: Any, **overrides: Any) -> int:
    return train("--max-steps", 1, "--batch-size", 2, "--save-steps", 0, *options, **overrides)


def decoded(tokenizer: Any, example: Any, k: int = 0) -> str:
    return tokenizer.decode([*example.prompt, *example.responses[k]])


@pytest.mark.parametrize("form", ["data set", "splits"])
def test_save_to_disk_folder(train: Train, fails: Fails, tmp_path: Path, form: str) -> None:
    table = datasets.Dataset.from_list(ROWS)
    (table if form == "data set" else datasets.DatasetDict({"train": table})).save_to_disk(tmp_path / "saved")
    assert one_step(train, dataset=tmp_path / "saved") == 0
    if form == "splits":
        message = fails("--split", "best", dataset=tmp_path / "saved", output_dir=tmp_path / "out-2")
        assert f"{tmp_path / 'saved'}: no split 'best'; it has train" in message


def test_configurations(train: Train, fails: Fails, tmp_path: Path) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    for name in ("maths", "chat"):
        write_jsonl(folder / f"{name}.jsonl", ROWS)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("maths", "chat"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    message = fails(dataset=folder)
    assert "it has several configurations; --dataset-config takes one of maths, chat" in message
    assert "local file" not in message and "load_dataset" not in message
    message = fails("--dataset-config", "code", dataset=folder)
    assert "no configuration 'code'; --dataset-config takes one of maths, chat" in message
    assert one_step(train, "--dataset-config", "maths", dataset=folder) == 0
    assert "a file has no configurations" in fails("--dataset-config", "maths", output_dir=tmp_path / "out-2")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    message = fails("--dataset-config", "maths", dataset=tmp_path / "saved", output_dir=tmp_path / "out-3")
    assert "what save_to_disk wrote has no configurations" in message


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_column_names(train: Train, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The columns of the same names, which are something else there, are not taken instead."""
    rows = [{"question": r["prompt"], "win": r["chosen"], "lose": r["rejected"], "chosen": 1} for r in ROWS]
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        write_jsonl(path, rows)
    names = ("--columns", "prompt=question,chosen=win", "--columns", "rejected=lose")
    assert one_step(train, *names, dataset=path) == 0
    assert "not used" not in capsys.readouterr().err.replace("not used: chosen", "")


def test_wrong_column_names(fails: Fails, pairs_file: Path) -> None:
    assert f"{pairs_file}:1: no column 'win'; the record has 'prompt'," in fails("--columns", "chosen=win")
    assert "--columns must be NAME=COLUMN,..., got 'chosen'" in fails("--columns", "chosen")
    assert "--columns best=win: best is not read; read are prompt, chosen" in fails("--columns", "best=win")


def test_checkpoint_given_as_a_model(train: Train, fails: Fails, tmp_path: Path) -> None:
    assert one_step(train, "--save-steps", 1, output_dir=tmp_path / "run") == 0
    for option in ({"model": tmp_path / "run" / "checkpoint-1"}, {}):
        more = () if option else ("--ref-model", tmp_path / "run" / "checkpoint-1")
        message = fails(*more, **option)
        assert "checkpoint-1 is a checkpoint, not a model: to go on with its run" in message
        assert f"--output-dir {tmp_path / 'run'} --resume" in message and "sentencepiece" not in message


def test_only_needed_columns_are_read(tmp_path: Path) -> None:
    rows = [{**row, "images": "x" * 100, "score": 1.0} for row in ROWS]
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    records = read_records(str(path), needed=("prompt", "chosen", "rejected"))
    assert records.table.column_names == ["prompt", "chosen", "rejected"]
    records = as_records(datasets.Dataset.from_list(rows), needed=("prompt", "chosen", "rejected"))
    assert records.unread == ("images", "score")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_is_not_used_is_named_once(
    train: Train, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "images": ["a.png"], "tools": json.dumps(TOOLS), "system": "be brief"} for row in ROWS]
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        write_jsonl(path, rows)
    assert one_step(train, dataset=path) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not used" in line]
    for name in ("images", "tools (there is no chat template", "system (there is no chat template"):
        assert name in line


def test_fields_that_the_template_lacks_are_named(tokenizer: Any) -> None:
    said: list[str] = []
    answer = assistant("", tool_calls=[CALL], reasoning_content="hm")
    row = {"prompt": [user("say red")], "chosen": [answer], "rejected": [assistant("no")], "tools": TOOLS}
    encode_rows([row, row], tokenizer, said.append)
    missing = [f"{name} of messages (not in the chat template)" for name in ("reasoning_content", "tool_calls")]
    assert said == [f"f: not used: {', '.join([*missing, 'tools (not in the chat template)'])}"]


def test_whole_messages_reach_the_template() -> None:
    """Tools, also as the JSON string that tables hold; a system prompt of its own column; arguments as a string."""
    tokenizer = build_chat_tokenizer("qwen3")
    call = {"function": {"name": "say", "arguments": '{"w": "red"}'}}
    chosen = [
        assistant("", tool_calls=[call]),
        {"role": "tool", "content": None},
        assistant("b", reasoning_content="r"),
    ]
    row = {"prompt": [user("say red")], "chosen": chosen, "rejected": [assistant("no")]}
    for tools in (TOOLS, json.dumps(TOOLS)):
        (example,) = encode_rows([{**row, "tools": tools, "system": "be brief"}], tokenizer)
        text = decoded(tokenizer, example)
        assert text.startswith("<|im_start|>system\nbe brief\n\n# Tools\n\n" + json.dumps(TOOLS[0]))
        assert '{"name": "say", "arguments": {"w": "red"}}' in text and "<think>\nr\n</think>" in text
        assert "<tool_response>\n\n</tool_response>" in text


def test_empty_system_prompt_and_two_of_them(tokenizer: Any) -> None:
    empty = {"role": "system", "content": ""}
    example = encode_one([empty, user("say")], [assistant("red")], tokenizer=tokenizer)
    assert tokenizer.decode(example.prompt) == "<|system|><|end|><|user|>say<|end|><|assistant|>"
    filled = encode_one([empty, user("say")], [assistant("red")], tokenizer=tokenizer, system="dog")
    assert tokenizer.decode(filled.prompt).startswith("<|system|>dog<|end|>")
    prompt = [{"role": "system", "content": "cat"}, user("say")]
    with pytest.raises(DataError, match="column system and the first message are two different system prompts"):
        encode_one(prompt, [assistant("red")], tokenizer=tokenizer, system="dog")


def test_arguments_do_not_get_the_keys_of_other_records(tmp_path: Path) -> None:
    """Arrow gives all structs of a column the same keys, null where they were absent."""
    tokenizer = build_chat_tokenizer("qwen3")

    def record(arguments: dict[str, Any]) -> dict[str, Any]:
        called = assistant("", tool_calls=[{"function": {"name": "f", "arguments": arguments}}])
        return {"prompt": [user("say")], "chosen": [called], "rejected": [assistant("no")]}

    datasets.Dataset.from_list([record({"w": "red"}), record({"n": 3})]).to_parquet(str(tmp_path / "data.parquet"))
    examples = encode(read_records(str(tmp_path / "data.parquet")), tokenizer, Encoding())
    assert '"arguments": {"w": "red"}' in decoded(tokenizer, examples[0])
    assert '"arguments": {"n": 3}' in decoded(tokenizer, examples[1])


A, B = assistant("cat"), assistant("no")
SYSTEM = {"role": "system", "content": "dog"}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": [user("x")], "chosen": [user("x"), A], "rejected": [user("x"), B]}, "<|user|>x<|end|>"),
        ({"prompt": [SYSTEM, user("x")], "chosen": [user("x"), A], "rejected": [user("x"), B]}, None),
        ({"prompt": [user("x")], "chosen": [SYSTEM, user("x"), A], "rejected": [SYSTEM, user("x"), B]}, None),
        ({"prompt": "x", "chosen": [SYSTEM, user("x"), A], "rejected": [SYSTEM, user("x"), B]}, None),
        ({"prompt": "x", "chosen": [A], "rejected": [B]}, "<|user|>x<|end|>"),
        ({"prompt": [user("x")], "chosen": "cat", "rejected": "no"}, "<|user|>x<|end|>"),
    ],
    ids=["messages", "end of prompt", "system", "system and string", "string prompt", "string responses"],
)
def test_prompt_repeated_in_messages(tokenizer: Any, row: dict[str, Any], text: str | None) -> None:
    (example,) = encode_rows([row], tokenizer)
    prompt = text or "<|system|>dog<|end|><|user|>x<|end|>"
    assert decoded(tokenizer, example) == f"{prompt}<|assistant|>cat<|end|>"
    assert tokenizer.decode(example.responses[0]) == "cat<|end|>"


def test_prompt_repeated_in_strings(tokenizer: Any) -> None:
    said: list[str] = []
    rows = [{"prompt": r["prompt"], **{n: r["prompt"] + r[n] for n in ("chosen", "rejected")}} for r in ROWS]
    for example, row in zip(encode_rows(rows, tokenizer, said.append), ROWS, strict=True):
        assert decoded(tokenizer, example) == row["prompt"] + row["chosen"] + "</s>"
    assert said == ["f: responses begin with their prompt, which is taken off them"]
    (sft,) = encode_rows([{"prompt": "say\n", "completion": "say\nred"}], tokenizer, stage="sft")
    assert decoded(tokenizer, sft) == "say\nred</s>"
    # One record in which they happen to begin alike says nothing about the others.
    (greeting, _) = encode_rows([{"prompt": "red", "chosen": "red cat", "rejected": "red no"}, ROWS[0]], tokenizer)
    assert decoded(tokenizer, greeting).startswith("redred cat")


def test_sharegpt_messages_and_text_parts(tokenizer: Any) -> None:
    turns = [{"from": "human", "value": "say red"}, {"from": "gpt", "value": "red"}]
    records = as_records([{"conversations": turns}], "f", {"messages": "conversations"})
    (example,) = encode(records, tokenizer, Encoding(stage="sft"))
    parts = [{"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "red"}]}]
    same = encode_one(parts, [assistant("red")], tokenizer=tokenizer)
    assert decoded(tokenizer, example) == decoded(tokenizer, same) == "<|user|>say red<|end|><|assistant|>red<|end|>"
    parts[0]["content"].append({"type": "image", "image": "a.png"})
    with pytest.raises(DataError, match=r"prompt\[0\].content\[2\] is of type 'image'; only text can be trained on"):
        encode_one(parts, [assistant("red")], tokenizer=tokenizer)


def test_equal_conversations_with_an_implicit_prompt_are_counted(tokenizer: Any) -> None:
    said: list[str] = []
    encode_rows([{"chosen": [user("x"), A], "rejected": [user("x"), A]}], tokenizer, said.append)
    assert said == ["1 pairs have equal chosen and rejected responses within --max-length: they teach nothing"]


def test_only_the_last_reply_of_an_hh_record_is_scored(tokenizer: Any) -> None:
    asked = "\n\nHuman: red\n\nAssistant: cat\n\nHuman: dog\n\nAssistant:"
    (example,) = encode_rows([{"chosen": f"{asked} I say cat", "rejected": f"{asked} I say no"}], tokenizer)
    assert tokenizer.decode(scored_ids(example, 0)) == " I say cat</s>"


class Tomorrow(datetime.date):
    @classmethod
    def today(cls) -> datetime.date:
        return datetime.date(2031, 5, 6)


def test_dated_template_is_frozen_for_the_run(
    train: Train, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed on another day: the same data, and the same cache of the reference."""
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    dated = '{{ strftime_now("%d %b %Y %H") }}' + (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(dated)
    rows = [{"prompt": [user(r["prompt"])], "chosen": [assistant(r["chosen"])], "rejected": [B]} for r in ROWS]
    options = {"dataset": write_jsonl(tmp_path / "chat.jsonl", rows), "model": model}
    steps = ("--batch-size", 2, "--save-steps", 1, "--learning-rate", 1e-2)
    assert train(*steps, "--max-steps", 2, **options) == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    began = json.loads((tmp_path / "out" / "args.json").read_text())["template_date"]
    assert began == datetime.date.today().isoformat()
    monkeypatch.setattr(train_data.datetime, "date", Tomorrow)
    assert train(*steps, "--max-steps", 2, "--resume", **options) == 0
    assert read_metrics(tmp_path / "out")[-1]["step"] == 2
    assert len(list((tmp_path / "out" / "reference-cache").iterdir())) == 1
    (tmp_path / "new").mkdir()
    assert train(*steps, "--max-steps", 1, **options, output_dir=tmp_path / "new") == 0
    assert json.loads((tmp_path / "new" / "args.json").read_text())["template_date"] == "2031-05-06"


def test_frozen_template_prints_its_day() -> None:
    tokenizer, day = build_tokenizer(), datetime.date(2026, 2, 3)
    for template in (LLAMA3, "\n{% for m in messages %}{{ strftime_now('%-d %B %y, %A %j %% %H:%M') }}{% endfor %}"):
        tokenizer.chat_template = frozen(template, day)
        text = tokenizer.apply_chat_template([user("x")], tokenize=False)
        tokenizer.chat_template = template
        today = tokenizer.apply_chat_template([user("x")], tokenize=False)
        assert ("3 February 26, Tuesday 034 % 00:00" if template != LLAMA3 else "Today Date: 03 Feb 2026") in text
        assert (text[:1] == today[:1] and text[-4:] == today[-4:]) or template != LLAMA3
    assert frozen("{{ messages }}", day) == "{{ messages }}"


def test_bad_date(fails: Fails) -> None:
    assert "--template-date must be YYYY-MM-DD, got 'today'" in fails("--template-date", "today")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 200_000, "JSON that can't be read"),
        ('{"prompt": ' + "9" * 5000 + "}", "JSON that can't be read: Exceeds the limit"),
        (json.dumps({**ROWS[0], "offset": 10**400}), "offset must be a finite number"),
        (
            json.dumps({**ROWS[0], "offset": -1e300}),
            "offset must be a finite number (the loss's input offset; --pair-input can name another column), at most "
            "3.4e+38 in size",
        ),
    ],
    ids=["brackets", "integer", "offset", "beyond float32"],
)
def test_monsters_of_json_have_a_line(fails: Fails, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({**ROWS[0], "offset": 1.0}) + f"\n{line}\n")
    assert f"{path}:2: {message}" in fails("--loss", "odpo", dataset=path)


def test_bad_record_of_a_worker_has_its_line(fails: Fails, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [*ROWS, {"prompt": "x"}])
    assert f"{path}:13: no column 'chosen'" in fails("--dataset-processes", 2, dataset=path)


@pytest.mark.parametrize(
    "said", [{"role": "\ud800"}, {"role": "assistant", "tool_calls": [{"name": "\ud800"}]}], ids=["role", "tool call"]
)
def test_lone_surrogates_outside_the_content(said: dict[str, Any]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ m.get('tool_calls', '') | tojson }}{% endfor %}"
    )
    row = {"prompt": [{**said, "content": "red"}], "chosen": [assistant("blue")], "rejected": [assistant("green")]}
    with pytest.raises(DataError, match=r"f: record 1: what the chat template makes .* is not valid Unicode"):
        encode_rows([row], tokenizer)


@pytest.mark.parametrize("name", ["a[1].parquet", "a?.parquet", "[b]/a.parquet"])
def test_the_name_of_a_parquet_file_is_no_pattern(tmp_path: Path, name: str) -> None:
    for each in ("a1.parquet", name):
        (tmp_path / each).parent.mkdir(exist_ok=True)
        datasets.Dataset.from_list([{"name": each}]).to_parquet(tmp_path / each)
    assert [row for _, row in read_records(str(tmp_path / name))] == [{"name": name}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "f: no records in it"), ([{}, {"prompt": b"x"}], "f: record 2: not what JSON can hold: .*bytes")],
    ids=["none", "bytes"],
)
def test_records_in_memory_that_cannot_be_read(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_records(rows, "f")


def test_cache_that_cannot_be_written(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    assert "encoded data can't be cached" in fails()
