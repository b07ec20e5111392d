"""From a record to one prompt and its responses, as strings or as chat messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spo_kernels.data.columns import RESPONSES
from spo_kernels.data.common import common
from spo_kernels.data.errors import DataError
from spo_kernels.data.messages import Messages, Row, Text, check_number, check_same_form, check_text, check_tools

# The turns of Anthropic's hh-rlhf, strings that hold whole conversations.
_HH_REPLY = "\n\nAssistant:"
_KEY = json.JSONEncoder(sort_keys=True).encode
# objectives compute in it
_LARGEST_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True)
class Sample:
    """A record's texts and numbers. `responses` is (completion,) for sft and (chosen, rejected) for preference.

    Attributes:
        where: file and line.
        inputs: what the loss reads of a pair, by its name for them.
        tools: JSON schemas for the chat template.
        options: further variables of the chat template, such as enable_thinking.
        unused: what the record holds and nothing can be done with.
    """

    where: str
    prompt: Text
    responses: tuple[Text, ...]
    inputs: dict[str, float] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Equal for records of the same prompt."""
        return _KEY(self.prompt)


def sft_sample(where: str, row: Row, repeated: bool = False) -> Sample:
    """From columns prompt and completion; or messages, of which the reply to the last user turn is learnt.

    Args:
        where: file and line, for complaints.
        row: the record.
        repeated: prompts that are strings stand at the beginning of completions once more, see `repeats_prompt`.
    """
    if "messages" not in row or "completion" in row:
        prompt, completion = check_text(where, row, "prompt"), check_text(where, row, "completion")
        if not isinstance(prompt, str) and isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        check_same_form(where, prompt=prompt, completion=completion)
        return _sample(where, row, *_without_prompt(prompt, (completion,), repeated))
    messages = check_text(where, row, "messages")
    if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: messages must be a list of at least two, the last with role 'assistant'")
    roles = [message["role"] for message in messages]
    # A reply may be several turns: a call of a tool, its result, an answer.
    n = len(roles) - roles[::-1].index("user") if "user" in roles else max(1, roles.index("assistant"))
    return _sample(where, row, messages[:n], (messages[n:],))


def preference_sample(where: str, row: Row, columns: Mapping[str, str] | None = None, repeated: bool = False) -> Sample:
    """From columns prompt, chosen and rejected; without a prompt, it is what the other two share.

    Args:
        where: file and line, for complaints.
        row: the record.
        columns: columns of further numbers, by the loss's name for them.
        repeated: prompts that are strings stand at the beginning of responses once more, see `repeats_prompt`.
    """
    chosen, rejected = check_text(where, row, "chosen"), check_text(where, row, "rejected")
    inputs = {
        name: check_number(
            where, row, column, f" (the loss's input {name}; --pair-input can name another column)", _LARGEST_FLOAT32
        )
        for name, column in (columns or {}).items()
    }
    prompt = None if row.get("prompt") is None else check_text(where, row, "prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        given = {} if prompt is None else {"prompt": prompt}
        check_same_form(where, **given, chosen=chosen, rejected=rejected)
    if isinstance(prompt, list) and isinstance(chosen, str):
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        # Some hub data sets (ultrafeedback_binarized) repeat a message of the conversation as a plain prompt.
        shared = chosen[: common(chosen, rejected)]
        said = any(message["content"].strip() == prompt.strip() for message in shared)
        prompt = None if said else [{"role": "user", "content": prompt}]
    if prompt is None:
        n = _implicit_prompt(where, chosen, rejected)
        return _sample(where, row, chosen[:n], (chosen[n:], rejected[n:]), inputs)
    return _sample(where, row, *_without_prompt(prompt, (chosen, rejected), repeated), inputs)


def repeats_prompt(rows: Iterable[Row], stage: str) -> bool:
    """Whether the responses of all rows begin with the prompt, all being strings: then it belongs to none of them.

    One record does not tell: "Hi" may be answered by "Hi there".
    """
    names = RESPONSES[stage]
    seen = False
    for row in rows:
        prompt, *texts = (row.get(name) for name in ("prompt", *names))
        if not isinstance(prompt, str) or not all(isinstance(t, str) and _longer(t, prompt) for t in texts):
            return False
        seen = True
    return seen


def _longer(text: str, prompt: str) -> bool:
    return text.startswith(prompt) and bool(text[len(prompt) :].strip())


def _sample(
    where: str, row: Row, prompt: Text, responses: tuple[Text, ...], inputs: dict[str, float] | None = None
) -> Sample:
    """With what goes to the chat template beside messages."""
    system, tools, options = row.get("system"), check_tools(where, row), row.get("chat_template_kwargs")
    if isinstance(prompt, str):
        given = {"system": system, "tools": tools, "chat_template_kwargs": options}
        unused = tuple(f"{name} (there is no chat template for strings)" for name, value in given.items() if value)
        return Sample(where, prompt, responses, inputs or {}, unused=unused)
    if system:
        prompt = _with_system(where, system, prompt)
    if options is not None and not isinstance(options, dict):
        raise DataError(f"{where}: chat_template_kwargs must be an object, got {type(options).__name__}")
    return Sample(where, prompt, responses, inputs or {}, tools, options or {})


def _with_system(where: str, system: Any, prompt: Messages) -> Messages:
    if not isinstance(system, str):
        raise DataError(f"{where}: system must be a string, got {type(system).__name__}")
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"] and prompt[0]["content"] != system:
        raise DataError(f"{where}: column system and the first message are two different system prompts")
    return [{**prompt[0], "content": system}, *prompt[1:]]


def _without_prompt(prompt: Text, texts: tuple[Text, ...], repeated: bool) -> tuple[Text, tuple[Text, ...]]:
    """(prompt, responses) where the responses say the prompt, or its end, once more."""
    if isinstance(prompt, str):
        removed = repeated and all(isinstance(text, str) and _longer(text, prompt) for text in texts)
        return prompt, tuple(text[len(prompt) :] for text in texts) if removed else texts
    heads: list[Any] = [text[0] for text in texts]
    if heads[0]["role"] == "system" != prompt[0]["role"] and all(head == heads[0] for head in heads):
        # Only the responses have the system message.
        prompt = [heads[0], *prompt]
    for n in range(min(len(prompt), *(len(text) - 1 for text in texts)), 0, -1):
        # A prompt that ends with a reply may be followed by the same reply.
        whole = n == len(prompt) or prompt[-n]["role"] != "assistant"
        if whole and all(text[:n] == prompt[-n:] for text in texts):
            return prompt, tuple(text[n:] for text in texts)
    return prompt, tuple(text[_repeated_turns(prompt, text) :] for text in texts)


def _repeated_turns(prompt: Text, text: Text) -> int:
    """With how many of the prompt's last turns a response begins, of which the first is no reply."""
    longest = min(len(prompt), len(text) - 1)
    for n in range(longest, 0, -1):
        turn: Any = prompt[-n]
        if turn["role"] != "assistant" and text[:n] == prompt[-n:]:
            return n
    return 0


def _implicit_prompt(where: str, chosen: Text, rejected: Text) -> int:
    """Length of the prompt that two responses begin with."""
    n = common(chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        n = _end_of_prompt(chosen, rejected, n)
    else:
        # Equal conversations share the last turn too, which is their response.
        n = min(n, len(chosen) - 1, len(rejected) - 1)
    if n == 0:
        raise DataError(f"{where}: no column 'prompt', and chosen and rejected do not begin with a shared prompt")
    if not chosen[n:] or not rejected[n:] or (isinstance(chosen, str) and chosen == rejected):
        raise DataError(f"{where}: no column 'prompt', and nothing is left of a response after the shared prompt")
    return n


def _end_of_prompt(a: str, b: str, n: int) -> int:
    """Whole words of the n characters that both share; a response keeps its leading space."""
    reply = a.rfind(_HH_REPLY, 0, n)
    if reply > 0:
        return reply + len(_HH_REPLY)
    # "= 12" and "= 13" share "= 1", but the responses are 12 and 13.
    while n > 0 and not (a[n - 1].isspace() or (a[n : n + 1].isspace() and b[n : n + 1].isspace())):
        n -= 1
    # A space belongs to the word after it, as in most tokenizers; a line break ends the prompt.
    n -= a[:n].endswith(" ")
    return n if a[:n].strip() else 0
