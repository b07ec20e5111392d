"""Where the prompt ends, where the response ends, and what is cut."""

from typing import Any

import pytest
import torch

from spo_kernels.train.batches import IGNORE_INDEX, collate, micro_batches, step_indices
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.encode import Example, encode
from spo_kernels.train.errors import TrainError
from spo_kernels.train.samples import Sample

from .conftest import build_tokenizer

EOS = 2
CPU = torch.device("cpu")


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(model="m", dataset="d", output_dir="o", **settings)


def encode_one(sample: Sample, tokenizer: Any, **settings: Any) -> Example:
    return encode([sample], tokenizer, config(**settings), lambda message: None)[0]


def test_ids_are_prompt_then_response_then_eos(tokenizer: Any) -> None:
    example = encode_one(Sample("x", "say ca", ("t cat", "dog")), tokenizer)
    assert tokenizer.decode(example.prompt) == "say ca"
    assert [tokenizer.decode(r) for r in example.responses] == ["t cat</s>", "dog</s>"]
    assert example.prompt.tolist() == tokenizer("say ca", add_special_tokens=False)["input_ids"]


def test_eos_in_the_text_is_not_doubled(tokenizer: Any) -> None:
    example = encode_one(Sample("x", "say", ("cat</s>",)), tokenizer)
    assert example.responses[0].tolist().count(EOS) == 1


def test_bos_comes_once() -> None:
    tokenizer = build_tokenizer(bos=True)
    for prompt in ("say", "<s>say"):
        example = encode_one(Sample("x", prompt, ("cat",)), tokenizer)
        assert example.prompt.tolist().count(1) == 1 and example.prompt[0] == 1
        assert 1 not in example.responses[0]


def test_chat_template_ends_the_turn_itself(tokenizer: Any) -> None:
    user, reply = {"role": "user", "content": "say cat"}, {"role": "assistant", "content": "cat"}
    example = encode_one(Sample("x", [user], ([reply],)), tokenizer)
    assert tokenizer.decode(example.prompt) == "<|user|>say cat<|end|><|assistant|>"
    assert tokenizer.decode(example.responses[0]) == "cat<|end|>"


@pytest.mark.parametrize("end", ["", "\n"])
def test_eos_follows_a_template_without_an_end(end: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + end + "{% endfor %}"
    user, reply = {"role": "user", "content": "say cat"}, {"role": "assistant", "content": "cat"}
    example = encode_one(Sample("x", [user], ([reply],)), tokenizer)
    assert example.responses[0][-1] == EOS


def test_template_that_opens_replies_differently_falls_back_to_the_header() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|>think"
    )
    user, reply = {"role": "user", "content": "say cat"}, {"role": "assistant", "content": "cat"}
    example = encode_one(Sample("x", [user], ([reply],)), tokenizer)
    assert tokenizer.decode(example.prompt) == "<|user|>say cat<|end|>"
    assert tokenizer.decode(example.responses[0]) == "<|assistant|>cat<|end|>"


def test_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    user, reply = {"role": "user", "content": "say cat"}, {"role": "assistant", "content": "cat"}
    with pytest.raises(TrainError, match="f:7: the chat template renders the prompt differently"):
        encode_one(Sample("f:7", [user], ([reply],)), tokenizer)


def test_long_responses_are_cut_and_counted(tokenizer: Any) -> None:
    said: list[str] = []
    sample = Sample("x", "say", ("cat " * 30, "no"))
    (example,) = encode([sample], tokenizer, config(max_length=12), said.append)
    assert len(example.prompt) + len(example.responses[0]) == 12 and EOS not in example.responses[0]
    assert example.responses[1][-1] == EOS
    assert said == ["1 responses cut to --max-length 12"]


def test_overlong_prompts_are_dropped_only_on_request(tokenizer: Any) -> None:
    said: list[str] = []
    samples = [Sample("f:1", "say " * 20, ("cat", "no")), Sample("f:2", "say", ("cat", "no"))]
    with pytest.raises(TrainError, match=r"f:1: prompt: \d+ tokens, over --max-prompt-length 8"):
        encode(samples, tokenizer, config(max_prompt_length=8), said.append)
    assert len(encode(samples, tokenizer, config(max_prompt_length=8, drop_overlong=True), said.append)) == 1
    assert said == ["1 of 2 records dropped: their prompts are over the limit"]


def test_collate_masks_prompts_and_padding(tokenizer: Any) -> None:
    samples = [Sample("x", "say cat", ("cat", "dog no")), Sample("x", "say", ("red red red", "no"))]
    examples = encode(samples, tokenizer, config(), lambda message: None)
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
