"""Where the prompt ends, where the response ends, and what is cut."""

from typing import Any

import pytest
import torch

from spo_kernels.data import DataError, Encoding, Example, Examples, as_records, encode
from spo_kernels.data.tokens import Tokens
from spo_kernels.integrations.token_batches import step_indices
from spo_kernels.train.batches import IGNORE_INDEX, collate
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.forwards import micro_batches

from .conftest import build_metaspace, build_tokenizer, pair, scored_ids

EOS = 2
CPU = torch.device("cpu")


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(model="m", dataset="d", output_dir="o", **settings)


def encode_rows(rows: list[Any], tokenizer: Any, warn: Any = lambda message: None, **settings: Any) -> Examples:
    """What is said of texts, which most records here are, is left out."""
    said: list[str] = []
    examples = encode(as_records(rows, "f"), tokenizer, Encoding(**settings), said.append)
    for message in said:
        if not message.endswith("the model's chat template is for messages"):
            warn(message)
    return examples


def encode_one(prompt: Any, *responses: Any, tokenizer: Any, warn: Any = lambda message: None, **more: Any) -> Example:
    """One record of sft (one response) or preference (two); `more` are columns."""
    names = ("completion",) if len(responses) == 1 else ("chosen", "rejected")
    row = {"prompt": prompt, **dict(zip(names, responses, strict=True)), **more}
    return encode_rows([row], tokenizer, warn, stage="sft" if len(responses) == 1 else "preference")[0]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def test_ids_are_prompt_then_response_then_eos(tokenizer: Any) -> None:
    example = encode_one("say\n", "cat", "dog", tokenizer=tokenizer)
    assert tokenizer.decode(example.prompt) == "say\n"
    assert [tokenizer.decode(r) for r in example.responses] == ["cat</s>", "dog</s>"]
    assert example.prompt.tolist() == tokenizer("say\n", add_special_tokens=False)["input_ids"]


def test_a_token_across_the_end_of_the_prompt_is_the_responses(tokenizer: Any) -> None:
    """ "say c" is s, ay, " c"; "say cat" has the token " cat": no id of the prompt is split, none is made up."""
    said: list[str] = []
    rows = [
        {"prompt": "say", "chosen": " cat", "rejected": " no"},
        {"prompt": "say c", "chosen": "at", "rejected": "x"},
    ]
    whole, split = encode_rows(rows, tokenizer, said.append)
    assert tokenizer.decode(whole.prompt) == tokenizer.decode(split.prompt) == "say"
    assert [tokenizer.decode(r) for r in split.responses] == [" cat</s>", " cx</s>"]
    for example, row in zip((whole, split), rows, strict=True):
        for k, name in enumerate(("chosen", "rejected")):
            joint = tokenizer(row["prompt"] + row[name], add_special_tokens=False)["input_ids"]
            assert [*example.prompt, *example.responses[k]] == [*joint, EOS]
    assert len(said) == 1 and said[0].startswith("1 records: a token spans the end of the prompt")


def test_prompt_that_no_token_is_left_of_is_encoded_alone(tokenizer: Any) -> None:
    example = encode_one(" c", "at", tokenizer=tokenizer)
    assert len(example.prompt) and tokenizer.decode([*example.prompt, *example.responses[0]]) == " cat</s>"


@pytest.mark.parametrize("scheme", ["first", "always", "llama-2"])
def test_no_space_is_inserted_at_the_boundary(scheme: str) -> None:
    """A response encoded alone begins with the space that these tokenizers put in front of any text."""
    tokenizer = build_metaspace(scheme)
    for prompt, response in (("<|assistant|>\n", "Paris"), ("x=", "12"), ("say", " cat")):
        example = encode_one(prompt, response, tokenizer=tokenizer)
        joint = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
        assert [*example.prompt, *example.responses[0]] == [*joint, EOS]
        alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert example.prompt.tolist() == alone


def test_eos_in_the_text_is_not_doubled(tokenizer: Any) -> None:
    example = encode_one("say", "cat</s>", tokenizer=tokenizer)
    assert example.responses[0].tolist().count(EOS) == 1


def test_bos_comes_once() -> None:
    tokenizer = build_tokenizer(bos=True)
    for prompt in ("say", "<s>say"):
        example = encode_one(prompt, "cat", tokenizer=tokenizer)
        assert example.prompt.tolist().count(1) == 1 and example.prompt[0] == 1
        assert 1 not in example.responses[0]


def test_chat_template_ends_the_turn_itself(tokenizer: Any) -> None:
    example = encode_one([user("say cat")], [assistant("cat")], tokenizer=tokenizer)
    assert tokenizer.decode(example.prompt) == "<|user|>say cat<|end|><|assistant|>"
    assert tokenizer.decode(example.responses[0]) == "cat<|end|>"


@pytest.mark.parametrize("end", ["", "\n"])
def test_eos_follows_a_template_without_an_end(end: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + end + "{% endfor %}"
    example = encode_one([user("say cat")], [assistant("cat")], tokenizer=tokenizer)
    assert example.responses[0][-1] == EOS and not example.scored


def test_white_space_after_the_end_of_a_turn_is_not_scored() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|end|>\n")
    example = encode_one([user("say cat")], [assistant("cat")], tokenizer=tokenizer)
    assert tokenizer.decode(example.responses[0]) == "cat<|end|>\n"
    assert tokenizer.decode(scored_ids(example, 0)) == "cat<|end|>"


@pytest.mark.parametrize("reply", ["cat", "think", "thinking of red", "<think>"])
def test_header_of_a_reply_that_the_template_opens_differently(reply: str) -> None:
    """As DeepSeek-R1's: a thinking tag of which a finished turn says nothing. The header's tokens are no reply's."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|>think"
    )
    asked = [user("say cat"), assistant("red"), user("say two")]
    turns = [assistant(reply), user("again"), assistant("two")]
    for prompt, response in ((asked[:1], turns[:1]), (asked, turns[:1]), (asked, turns)):
        example = encode_one(prompt, response, tokenizer=tokenizer)
        # a reply that begins as the tag does has it in its prompt, as the model would
        tag = "think" if reply.startswith("think") else ""
        assert tokenizer.decode(example.prompt).endswith(f"<|end|><|assistant|>{tag}")
        said = [tokenizer.decode(example.responses[0][start:end]) for start, end in example.spans(0)]
        rest = ["two<|end|>"] if len(response) > 1 else []
        assert said == [f"{reply.removeprefix(tag)}<|end|>", *rest]


def test_replies_that_a_template_shortens_are_counted() -> None:
    """DeepSeek-R1's: what stands before the end of the thought is gone, and only a reply that is begun has the tag."""
    said: list[str] = []
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}"
    )
    rows = [
        {"prompt": [user("say cat")], "chosen": [assistant(chosen)], "rejected": [assistant(" no\n")]}
        for chosen in ("<think>one</think>cat", "cat", "<think>one</think>")
    ]
    examples = encode_rows(rows, tokenizer, said.append)
    assert [tokenizer.decode(scored_ids(example, 0)) for example in examples] == ["cat<|end|>", "cat<|end|>", "<|end|>"]
    assert [line.split(";")[0] for line in said] == [
        "2 responses: the chat template leaves out or changes part of what the assistant says"
    ]
    said.clear()
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    encode_rows(rows[1:2], tokenizer, said.append)
    assert len(said) == 1 and said[0].startswith("1 records: the chat template opens a reply with text that a finished")


def test_template_that_gives_a_finished_turn_another_header() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|user|>"
    )
    example = encode_one([user("say cat")], [assistant("cat")], tokenizer=tokenizer)
    assert tokenizer.decode(example.prompt) == "<|user|>say cat<|end|>"
    assert tokenizer.decode(example.responses[0]) == "<|assistant|>cat<|end|>"


def test_template_that_rewrites_the_prompt() -> None:
    """What is read is the whole conversation's rendering, as long as the reply is found in it."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    example = encode_one([user("say cat")], [assistant("dog")], tokenizer=tokenizer)
    assert tokenizer.decode(example.prompt) == "2say cat"
    assert tokenizer.decode(example.responses[0]) == "dog</s>"
    tokenizer.chat_template = "{{ messages | length }}{{ messages[0].content }}"
    with pytest.raises(DataError, match="f: record 1: the chat template renders the prompt differently once others"):
        encode_one([user("say cat")], [assistant("dog")], tokenizer=tokenizer)


def test_long_responses_are_cut_and_counted(tokenizer: Any) -> None:
    said: list[str] = []
    row = {"prompt": "say\n", "chosen": "cat " * 30, "rejected": "no"}
    (example,) = encode_rows([row], tokenizer, said.append, max_length=12)
    assert len(example.prompt) + len(example.responses[0]) == 12 and EOS not in example.responses[0]
    assert example.responses[1][-1] == EOS
    assert said == ["1 responses cut to --max-length 12"]


def test_texts_beside_a_chat_template_and_beside_messages_are_said(tokenizer: Any) -> None:
    texts = {"prompt": "say\n", "chosen": "cat", "rejected": "no"}
    messages = {"prompt": [user("say")], "chosen": [assistant("cat")], "rejected": [assistant("no")]}
    plain = build_tokenizer()
    plain.chat_template = None
    said: list[str] = []

    def look(rows: list[Any], tokenizer: Any) -> None:
        encode(as_records(rows, "f"), tokenizer, Encoding(), said.append)

    look([texts], plain)
    look([messages], tokenizer)
    assert said == []
    look([texts], tokenizer)
    assert said.pop() == "f: records are texts, encoded as they are; the model's chat template is for messages"
    look([texts, messages], tokenizer)
    assert said == ["f: some records are texts, which are encoded as they are, and some messages"]


def test_pairs_that_differ_only_beyond_the_cut_are_equal(tokenizer: Any) -> None:
    said: list[str] = []
    row = {"prompt": "say\n", "chosen": "cat " * 30 + "dog", "rejected": "cat " * 30 + "no"}
    encode_rows([row, row | {"rejected": "no"}], tokenizer, said.append, max_length=12)
    assert said[1:] == ["1 pairs have equal chosen and rejected responses within --max-length: they teach nothing"]


def test_overlong_prompts_are_dropped_only_on_request(tokenizer: Any) -> None:
    said: list[str] = []
    rows = [{"prompt": p, "chosen": "cat", "rejected": "no"} for p in ("say " * 20, "say\n")]
    with pytest.raises(DataError, match=r"f: record 1: prompt: \d+ tokens, over --max-prompt-length 8"):
        encode_rows(rows, tokenizer, said.append, max_prompt_length=8)
    assert len(encode_rows(rows, tokenizer, said.append, max_prompt_length=8, drop_overlong=True)) == 1
    assert said[0] == "1 of 2 records dropped: over the limit"
    # what was dropped on request is not found again without it
    with pytest.raises(DataError, match=r"over --max-prompt-length 8"):
        encode_rows(rows, tokenizer, said.append, max_prompt_length=8)


@pytest.mark.parametrize("text", ["cat dog red ", "x", " ", "\n\n", "é漢🙂", "catdogred"])
@pytest.mark.parametrize("scheme", ["bytes", "first", "llama-2"])
def test_long_texts_are_encoded_in_part_with_the_same_ids(scheme: str, text: str) -> None:
    tokenizer = build_tokenizer() if scheme == "bytes" else build_metaspace(scheme)
    limit = 40
    tokens, text = Tokens(tokenizer, limit), "say " + text * 4000
    ((ids,),) = tokens.ids([[text]])
    assert ids[:limit] == tokenizer(text, add_special_tokens=False)["input_ids"][:limit]


def test_a_monstrous_record_costs_what_its_limit_needs(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    call = type(tokenizer).__call__

    def counting(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal read
        read += sum(map(len, text)) if isinstance(text, list) else len(text)
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    rows = [{"prompt": "say\n", "chosen": "cat " * 1_000_000, "rejected": "no"}]
    rows += [{"prompt": [user("say cat")], "chosen": [assistant("cat " * 1_000_000)], "rejected": [assistant("no")]}]
    for row in rows:
        (example,) = encode_rows([row], tokenizer, max_length=128)
        assert len(example.prompt) + len(example.responses[0]) == 128
    # Of 8 million characters.
    assert read < 20_000
    with pytest.raises(DataError, match="f: record 1: prompt: at least"):
        encode_rows([{"prompt": "cat " * 1_000_000, "completion": "no"}], tokenizer, stage="sft", max_length=128)


def test_added_tokens_cost_nothing(tokenizer: Any) -> None:
    """Calls of the tokenizer's table of added tokens, which has 6,400 entries for some models: one, not one a pair."""
    calls = 0

    class Counting(type(tokenizer)):  # type: ignore[misc]
        @property
        def added_tokens_decoder(self) -> Any:
            nonlocal calls
            calls += 1
            return super().added_tokens_decoder

    counted = build_tokenizer()
    counted.__class__ = Counting
    rows = [{"prompt": [user("say cat")], "chosen": [assistant("cat")], "rejected": [assistant("no")]}] * 50
    assert len(encode_rows(rows, counted)) == 50 and calls <= 2


def test_workers_and_cache_give_the_same(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"say {i}\n", "chosen": "cat", "rejected": f"no {i}"} for i in range(7)]
    one = encode_rows(rows, tokenizer)
    records = as_records([*rows, rows[0]], "f")
    two = encode(records, tokenizer, Encoding(), processes=2)
    assert [e.prompt.tolist() for e in two] == [e.prompt.tolist() for e in [*one, one[0]]]
    monkeypatch.setattr("spo_kernels.data.encoding._Encoder.__call__", None)
    again = encode_rows(rows, tokenizer)
    assert [e.responses[1].tolist() for e in again] == [e.responses[1].tolist() for e in one]
    with pytest.raises(TypeError):
        encode_rows(rows, tokenizer, max_length=99)


def test_the_data_set_has_the_columns_that_trl_takes(tokenizer: Any) -> None:
    examples = encode_rows([pair(i) for i in range(4)], tokenizer)
    rest, held_out = examples.hold_out(0.5, seed=0)
    assert len(rest) == len(held_out) == 2
    for side in (rest, held_out):
        for example, row in zip(side, side.dataset, strict=True):
            assert row["prompt_ids"] == example.prompt.tolist()
            assert (row["chosen_ids"], row["rejected_ids"]) == tuple(r.tolist() for r in example.responses)


def test_collate_masks_prompts_and_padding(tokenizer: Any) -> None:
    prompts, texts = ("say cat\n", "say\n"), (("cat", "dog no"), ("red red red", "no"))
    rows = [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in zip(prompts, texts, strict=True)]
    examples = encode_rows(rows, tokenizer)
    input_ids, labels = collate(examples, CPU)
    order = [(examples[0], 0), (examples[1], 0), (examples[0], 1), (examples[1], 1)]
    assert input_ids.shape == labels.shape == (4, max(e.longest for e in examples))
    for row, (example, k) in enumerate(order):
        n, response = len(example.prompt), example.responses[k].tolist()
        end = n + len(response)
        assert input_ids[row, :end].tolist() == [*example.prompt.tolist(), *response]
        assert labels[row, n:end].tolist() == response
        assert (labels[row, :n] == IGNORE_INDEX).all() and (labels[row, end:] == IGNORE_INDEX).all()


def test_stream_of_steps_sees_every_record_once_an_epoch() -> None:
    n, per_step = 10, 4
    stream = [i for step in range(5) for i in step_indices(step, n, per_step, seed=1)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:] and stream[:4] != step_indices(0, n, per_step, seed=2)


def test_processes_share_a_step_without_overlap() -> None:
    step = list(range(12))
    parts = [micro_batches(step, rank, 3, 2) for rank in range(3)]
    assert [len(p) for p in parts] == [2, 2, 2]
    assert sorted(i for part in parts for batch in part for i in batch) == step
