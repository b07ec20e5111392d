"""Samples to token ids.

A sequence is the ids of the prompt, then the ids of the response, then end-of-sequence: the two are
tokenised separately and concatenated. So the prompt's ids never depend on the response, chosen and
rejected share them exactly, and at generation time the model meets the same boundary (tokenising the
joined text may merge across it). The price: a tokenizer that would merge across never does so here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spo_kernels.train.config import TrainConfig
from spo_kernels.train.errors import TrainError
from spo_kernels.train.samples import Messages, Sample, Text


@dataclass(frozen=True)
class Example:
    """Token ids of a sample, int32; responses include the end-of-sequence token unless they were cut."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    inputs: dict[str, float] = field(default_factory=dict)

    @property
    def response_tokens(self) -> int:
        return sum(len(r) for r in self.responses)

    @property
    def tokens(self) -> int:
        return sum(len(self.prompt) + len(r) for r in self.responses)

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(r) for r in self.responses)


def encode(samples: list[Sample], tokenizer: Any, config: TrainConfig, warn: Callable[[str], None]) -> list[Example]:
    """Tokenise, end and cut all samples; what was cut or dropped is counted through `warn`."""
    texts = [_render(sample, tokenizer) for sample in samples]
    prompts = _ids(tokenizer, [prompt for prompt, _ in texts])
    responses = [_ids(tokenizer, [r[k] for _, r in texts]) for k in range(len(samples[0].responses))]
    prefix = _special_prefix(tokenizer)
    examples, cut, dropped = [], 0, 0
    for i, sample in enumerate(samples):
        prompt = prompts[i]
        if isinstance(sample.prompt, str) and prompt[: len(prefix)] != prefix:
            prompt = prefix + prompt
        if len(prompt) > min(config.prompt_limit, config.max_length - 1) and config.drop_overlong:
            dropped += 1
            continue
        _check_prompt(sample, len(prompt), config)
        whole = [_end(sample, k, column[i], tokenizer) for k, column in enumerate(responses)]
        kept = [ids[: config.max_length - len(prompt)] for ids in whole]
        cut += sum(len(a) < len(b) for a, b in zip(kept, whole, strict=True))
        examples.append(Example(_array(prompt), tuple(map(_array, kept)), sample.inputs))
    if dropped:
        warn(f"{dropped} of {len(samples)} records dropped: their prompts are over the limit")
    if cut:
        warn(f"{cut} responses cut to --max-length {config.max_length}")
    if not examples:
        raise TrainError("no record is left: every prompt is over the limit")
    return examples


def _check_prompt(sample: Sample, n: int, config: TrainConfig) -> None:
    if n == 0:
        raise TrainError(f"{sample.where}: prompt has no tokens")
    if n >= config.max_length:
        raise TrainError(
            f"{sample.where}: prompt: {n} tokens leave nothing of the response "
            f"within --max-length {config.max_length} (--drop-overlong drops such records)"
        )
    if n > config.prompt_limit:
        raise TrainError(
            f"{sample.where}: prompt: {n} tokens, over --max-prompt-length {config.prompt_limit}"
            " (--drop-overlong drops such records)"
        )


def _end(sample: Sample, k: int, ids: list[int], tokenizer: Any) -> list[int]:
    """Append end-of-sequence, unless the text or the chat template has ended the turn already."""
    if not ids:
        raise TrainError(f"{sample.where}: response {k + 1} has no tokens")
    if ids[-1] == tokenizer.eos_token_id:
        return ids
    if not isinstance(sample.prompt, str) and _turn_is_ended(ids, tokenizer):
        return ids
    return [*ids, tokenizer.eos_token_id]


def _turn_is_ended(ids: list[int], tokenizer: Any) -> bool:
    """The last token that is not white space is a special one, such as <|im_end|>."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token in reversed(ids):
        if token in special:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def _render(sample: Sample, tokenizer: Any) -> tuple[str, tuple[str, ...]]:
    """Text of the prompt and of each response, through the chat template where they are messages."""
    if isinstance(sample.prompt, str):
        return sample.prompt, tuple(str(r) for r in sample.responses)
    if not getattr(tokenizer, "chat_template", None):
        raise TrainError(f"{sample.where}: the data are chat messages, but the tokenizer has no chat template")
    full = [_template(sample, tokenizer, sample.prompt + _messages(r), False) for r in sample.responses]
    # Some templates open the reply with text that they leave out of a finished turn (a thinking tag):
    # then the reply's header counts as part of the response.
    for add_generation_prompt in (True, False):
        prompt = _template(sample, tokenizer, sample.prompt, add_generation_prompt)
        if all(text.startswith(prompt) for text in full):
            return prompt, tuple(text[len(prompt) :] for text in full)
    raise TrainError(f"{sample.where}: the chat template renders the prompt differently when a response follows")


def _messages(text: Text) -> Messages:
    assert not isinstance(text, str)
    return text


def _template(sample: Sample, tokenizer: Any, messages: Messages, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    # Templates are programs and raise what they like: unknown role, roles that do not alternate.
    except Exception as error:
        raise TrainError(f"{sample.where}: the chat template rejects the messages: {error}") from error


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _special_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text, such as [BOS]; chat templates write it themselves."""
    bare, full = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    return next((full[:i] for i in range(len(full)) if full[i : i + len(bare)] == bare), [])


def _array(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)
