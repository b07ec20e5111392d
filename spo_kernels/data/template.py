"""Chat templates: where the prompt ends, which of a response's turns are the assistant's, and no clock in it."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from spo_kernels.data.errors import DataError
from spo_kernels.data.messages import Messages
from spo_kernels.data.samples import Sample

Span = tuple[int, int]
# Codes of strftime; "%%" comes last.
_CODES = [*(f"%{code}" for code in "aAwdbBmyYHIpMSfjUWGuVcxX"), "%-d", "%-m", "%-H", "%-I", "%-M", "%-S", "%-j", "%%"]


@dataclass(frozen=True)
class Rendered:
    """Texts of a sample: `full` is prompt and response, of which the parts in `scored` count (None: all after the
    prompt). `lost` responses have earlier turns that can't be told apart, so only the last one is scored.
    """

    prompt: str
    full: tuple[str, ...]
    scored: tuple[list[Span] | None, ...]
    unused: tuple[str, ...] = ()
    lost: int = 0


def frozen(template: str, date: datetime.date) -> str:
    """The template with `strftime_now` answering `date`: what it prints does not change from day to day."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(f' | replace("{code}", "{date.strftime(code)}")' for code in _CODES if code in template)
    # The line break is the one that the environment takes away after a block.
    return "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro %}\n" + template


class ChatTemplate:
    """A tokenizer's chat template on one day."""

    def __init__(self, tokenizer: Any, date: datetime.date) -> None:
        self._tokenizer, self._date = tokenizer, date
        self._sources: dict[bool, str] = {}

    @cached_property
    def _variables(self) -> dict[str, Any]:
        """Special tokens that it names."""
        mentioned = self.source() + self.source(tools=True)
        return {name: token for name, token in self._tokenizer.special_tokens_map.items() if name in mentioned}

    def source(self, tools: bool = False) -> str:
        """Its text; some tokenizers have another one for tools."""
        if tools not in self._sources:
            self._sources[tools] = frozen(self._tokenizer.get_chat_template(tools=[] if tools else None), self._date)
        return self._sources[tools]

    def render(self, sample: Sample) -> Rendered:
        """Texts of a sample's prompt, and of prompt and response."""
        if isinstance(sample.prompt, str):
            full = tuple(sample.prompt + str(response) for response in sample.responses)
            return Rendered(sample.prompt, full, (None,) * len(full), sample.unused)
        if not getattr(self._tokenizer, "chat_template", None):
            raise DataError(f"{sample.where}: the data are chat messages, but the tokenizer has no chat template")
        conversations = [[*sample.prompt, *response] for response in sample.responses]
        whole, marked = self._texts(sample, conversations, False, mark=True)
        prompt = self._prompt(sample, whole)
        scored, lost = [], 0
        for messages, text, spans in zip(conversations, whole, marked, strict=True):
            own = [(max(start, len(prompt)), end) for start, end in spans if end > len(prompt)]
            if not own and [m["role"] for m in messages[len(sample.prompt) :]] != ["assistant"]:
                own, known = self._turns(sample, messages, text)
                lost += not known
            scored.append(own or None)
        return Rendered(prompt, tuple(whole), tuple(scored), self._unused(sample, conversations), lost)

    def _prompt(self, sample: Sample, full: list[str]) -> str:
        assert not isinstance(sample.prompt, str)
        # Some templates open the reply with text that they leave out of a finished turn (a thinking tag): then the
        # reply's header counts as part of the response.
        for opened in (True, False):
            (text,), _ = self._texts(sample, [sample.prompt], opened)
            if all(other.startswith(text) for other in full):
                return text
        raise DataError(f"{sample.where}: the chat template renders the prompt differently when a response follows")

    def _turns(self, sample: Sample, messages: Messages, full: str) -> tuple[list[Span], bool]:
        """Where the assistant speaks in the response, and whether all of its turns were found."""
        turns = [i for i in range(len(sample.prompt), len(messages)) if messages[i]["role"] == "assistant"]
        if not turns:
            raise DataError(f"{sample.where}: a response without a turn of the assistant")
        spans: list[Span] = []
        for i in turns:
            start = self._start(sample, messages[:i], full)
            if start is not None and i + 1 < len(messages):
                span = self._span(sample, messages[: i + 1], full, start)
            else:
                span = None if start is None else (start, len(full))
            if span is not None:
                spans.append(span)
        if not spans:
            raise DataError(
                f"{sample.where}: the chat template renders turns differently once others follow, so the assistant's "
                "can't be found; mark them in it with {% generation %}"
            )
        return spans, len(spans) == len(turns)

    def _start(self, sample: Sample, messages: Messages, full: str) -> int | None:
        for opened in (True, False):
            (text,), _ = self._texts(sample, [messages], opened)
            if full.startswith(text):
                return len(text)
        return None

    def _span(self, sample: Sample, messages: Messages, full: str, start: int) -> Span | None:
        """The last of `messages` in the whole conversation, of which it is not the last."""
        (text,), _ = self._texts(sample, [messages], False)
        if full.startswith(text):
            return start, len(text)
        # Qwen3 renders a turn's reasoning only where it is the last: what is left of it is the end of the turn.
        turn, content = text[start:], messages[-1]["content"].strip()
        i = turn.find(full[start : start + 4])
        while i >= 0:
            if full.startswith(turn[i:], start) and content in turn[i:]:
                return start, start + len(turn) - i
            i = turn.find(full[start : start + 4], i + 1)
        return None

    def _texts(
        self, sample: Sample, conversations: list[Messages], opened: bool, mark: bool = False
    ) -> tuple[list[str], list[list[Span]]]:
        """Renderings, and the parts in {% generation %} where the template has such."""
        from transformers.utils import chat_template_utils

        source = self.source(sample.tools is not None)
        mark = mark and re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        try:
            rendered: Any = chat_template_utils.render_jinja_template(
                conversations=conversations,
                tools=list(sample.tools) if sample.tools else None,
                chat_template=source,
                add_generation_prompt=opened,
                return_assistant_tokens_mask=mark,
                **{**self._variables, **sample.options},
            )
        # Templates are programs and raise what they like: unknown role, roles that do not alternate.
        except Exception as error:
            raise DataError(f"{sample.where}: the chat template rejects the messages: {error}") from error
        texts, spans = rendered
        return texts, spans if mark else [[] for _ in texts]

    def _unused(self, sample: Sample, conversations: list[Messages]) -> tuple[str, ...]:
        """What the template does not even mention."""
        source = self.source(sample.tools is not None)
        fields = {key for messages in conversations for message in messages for key in message}
        missing = [f"{key} of messages" for key in sorted(fields - {"role", "content"}) if not _mentioned(key, source)]
        if sample.tools and "tools" not in source:
            missing.append("tools")
        missing += [key for key in sample.options if key not in source]
        return tuple(f"{name} (not in the chat template)" for name in missing)


def _mentioned(key: str, source: str) -> bool:
    # transformers gives reasoning under each of its names.
    names = ("reasoning_content", "thinking", "reasoning")
    return any(name in source for name in (names if key in names else (key,)))
