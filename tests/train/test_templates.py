"""Conversations through chat templates of five styles: every token is the template's, only the assistant's count."""

import random
from typing import Any

import pytest

from spo_kernels.data import DataError

from .conftest import build_tokenizer, scored_ids, write_jsonl
from .templates import ENDS, TEMPLATES, TOOLS, build_chat_tokenizer, conversation, plain
from .test_encode import assistant, encode_rows, user


def whole(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The conversation that a record's response belongs to; content null is the empty string."""
    prompt = row["prompt"] if isinstance(row.get("prompt"), list) else []
    return [{**message, "content": message["content"] or ""} for message in [*prompt, *row[name]]]


def replies(row: dict[str, Any], name: str, style: str) -> list[str]:
    """What is to be scored of a record's response: text at the end of each of the assistant's turns, without header."""
    turns = row[name] if isinstance(row.get("prompt"), list) else row[name][-1:]
    said = []
    for message in (m for m in turns if m["role"] == "assistant"):
        content = message["content"] or ""
        if message.get("tool_calls"):
            content = {"qwen3": "</tool_call>", "llama-3": "}"}.get(style, "}]")
        said.append((content.strip() if style == "llama-3" else content) + ENDS[style])
    return said


@pytest.mark.parametrize("style", TEMPLATES)
def test_prompt_and_response_are_the_templates_rendering(style: str) -> None:
    """2,000 random conversations, token for token; and each reply is scored with its end, nothing else is."""
    rng, tokenizer = random.Random(style), build_chat_tokenizer(style)
    rows = [conversation(rng, style) for _ in range(250)]
    said: list[str] = []
    examples = encode_rows(rows, tokenizer, said.append, max_length=4096)
    for row, example in zip(rows, examples, strict=True):
        for k, name in enumerate(("chosen", "rejected")):
            messages = whole(row, name)
            expected = tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False)
            ids = [*example.prompt.tolist(), *example.responses[k].tolist()]
            assert tokenizer.decode(ids) == expected
            assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
            parts = [example.responses[k][a:b] for a, b in example.spans(k)]
            turns = replies(row, name, style)
            assert len(parts) == len(turns)
            for part, turn in zip(parts, turns, strict=True):
                text = tokenizer.decode(part)
                assert text.endswith(turn) and text.count(ENDS[style]) == 1
                assert not set(text.split()) & {"<|user|>", "user", "[INST]"}
    assert not [message for message in said if "not scored" in message or "spans the end" in message], said


def test_system_prompt_that_only_an_open_question_has() -> None:
    """Mistral v0.3 shows it where the last message is the user's, so not in a whole conversation."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% set system = messages[0].content if messages[0].role == 'system' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "<|user|>{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}"
        "{% else %}<|assistant|>{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    said: list[str] = []
    prompt = [{"role": "system", "content": "be brief"}, user("say red"), assistant("red"), user("say cat")]
    turns = [assistant("red"), user("say red"), assistant("cat")]
    rows = [{"prompt": prompt, "chosen": turns, "rejected": [assistant("red dog")]}]
    (example,) = encode_rows(rows, tokenizer, said.append)
    for k, name in enumerate(("chosen", "rejected")):
        text = tokenizer.apply_chat_template([*prompt, *rows[0][name]], tokenize=False)
        assert tokenizer.decode([*example.prompt, *example.responses[k]]) == text
    assert tokenizer.decode(example.prompt) == "<|user|>say red<|assistant|>red</s><|user|>say cat<|assistant|>"
    assert tokenizer.decode(scored_ids(example, 0)) == "red</s>cat</s>"
    assert tokenizer.decode(scored_ids(example, 1)) == "red dog</s>"
    assert len(said) == 1 and said[0].startswith("1 records: the chat template renders the prompt differently")


def test_strings_are_their_own_rendering(tokenizer: Any) -> None:
    rng = random.Random(0)
    rows = [plain(rng) for _ in range(400)]
    for row, example in zip(rows, encode_rows(rows, tokenizer, max_length=4096), strict=True):
        for k, name in enumerate(("chosen", "rejected")):
            text = row.get("prompt", "") + row[name]
            assert tokenizer.decode([*example.prompt, *example.responses[k]]) == text + "</s>"
        if "prompt" not in row:
            # The words that both responses begin with belong to them.
            assert tokenizer.decode(example.prompt).endswith("\n\nAssistant:")


@pytest.mark.parametrize("style", TEMPLATES)
def test_all_shapes_train(style: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers as tf

    from spo_kernels.train.cli import main

    rng, tokenizer = random.Random(1), build_chat_tokenizer(style)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **size)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [conversation(rng, style) if i % 3 else plain(rng) for i in range(30)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    options = ["--model", tmp_path / "model", "--dataset", data, "--output-dir", tmp_path / "out", "--max-steps", 2]
    assert main([*map(str, options), "--quiet", "--max-length", "2048"]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_templates_generation_mask_decides() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'user' }}|>"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = [assistant("red"), user("say cat"), assistant("cat dog")]
    rows = [{"prompt": [user("say red")], "chosen": turns, "rejected": turns[:1]}]
    (example,) = encode_rows(rows, tokenizer)
    assert tokenizer.decode(scored_ids(example, 0)) == "red<|end|>cat dog<|end|>"
    assert tokenizer.decode(scored_ids(example, 1)) == "red<|end|>"
    reference = tokenizer.apply_chat_template(
        [user("say red"), *turns], return_dict=True, return_assistant_tokens_mask=True
    )
    scored = [i for i, mask in zip(reference["input_ids"], reference["assistant_masks"], strict=True) if mask]
    assert scored_ids(example, 0) == scored


def test_turns_that_cannot_be_told_apart_are_said(tokenizer: Any) -> None:
    """A template that shortens all but the last two messages: the earlier reply is not found, the last one is."""
    shortened = build_tokenizer()
    shortened.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content if m.role == 'user' or loop.last else 'short' }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    said: list[str] = []
    turns = [assistant("red dog"), user("say cat"), assistant("cat dog")]
    rows = [{"prompt": [user("say red")], "chosen": turns, "rejected": [assistant("no")]}]
    (example,) = encode_rows(rows, shortened, said.append)
    assert shortened.decode(scored_ids(example, 0)) == "cat dog<|end|>"
    assert said == [
        "1 responses: the chat template leaves out or changes part of what the assistant says; what it renders is "
        "trained on",
        "1 responses: the chat template renders some turns differently once others follow; they are not scored",
    ]


def test_response_without_the_assistant(tokenizer: Any) -> None:
    rows = [{"prompt": [user("say red")], "chosen": [user("x")], "rejected": [assistant("no")]}]
    with pytest.raises(DataError, match="f: record 1: a response without a turn of the assistant"):
        encode_rows(rows, tokenizer)


def test_a_turn_beyond_the_cut_scores_nothing(tokenizer: Any) -> None:
    late = [user("say cat " * 9), assistant("cat")]
    rows = [{"prompt": [user("say red")], "chosen": late, "rejected": [assistant("no")]}]
    with pytest.raises(DataError, match="response 1: no turn of the assistant begins within --max-length 20"):
        encode_rows(rows, tokenizer, max_length=20)


def test_sft_learns_the_reply_to_the_last_question() -> None:
    tokenizer = build_chat_tokenizer("qwen3")
    called = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]
    messages = [user("a"), assistant("b"), user("c"), *called, {"role": "tool", "content": "7"}, assistant("it is 7")]
    (example,) = encode_rows([{"messages": messages, "tools": TOOLS}], tokenizer, stage="sft")
    assert tokenizer.decode(example.prompt).endswith("c<|im_end|>\n<|im_start|>assistant\n")
    text = tokenizer.decode(scored_ids(example, 0))
    assert text == (
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|><think>\n\n</think>\n\nit is 7<|im_end|>'
    )


def test_the_prompts_own_thinking_switch() -> None:
    tokenizer = build_chat_tokenizer("qwen3")
    row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    (example,) = encode_rows([row | {"chat_template_kwargs": {"enable_thinking": False}}], tokenizer)
    assert tokenizer.decode(example.prompt).endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(example.responses[0]) == "b<|im_end|>\n"
