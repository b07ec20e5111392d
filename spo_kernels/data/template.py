"""Chat templates: texts of conversations, with no clock in them."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from spo_kernels.data.errors import DataError
from spo_kernels.data.messages import Messages, check_unicode
from spo_kernels.data.samples import Sample

Span = tuple[int, int]
# Codes of strftime; "%%" comes last.
_CODES = [*(f"%{code}" for code in "aAwdbBmyYHIpMSfjUWGuVcxX"), "%-d", "%-m", "%-H", "%-I", "%-M", "%-S", "%-j", "%%"]


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

    def text(self, sample: Sample, messages: Messages, opened: bool = False) -> str:
        """Rendering of messages with the sample's tools; `opened`: with the beginning of a reply."""
        ((text, _),) = self.texts([(sample, messages)], opened)
        return text

    def texts(
        self, wanted: Sequence[tuple[Sample, Messages]], opened: bool = False, mark: bool = False
    ) -> list[tuple[str, list[Span]]]:
        """Renderings of many; `mark`: also the parts in {% generation %}, where the template has such."""
        rendered: list[tuple[str, list[Span]]] = []
        for _, group in groupby(wanted, lambda pair: (pair[0].tools, pair[0].options)):
            rendered += self._alike(list(group), opened, mark)
        return rendered

    def _alike(
        self, wanted: list[tuple[Sample, Messages]], opened: bool, mark: bool
    ) -> Iterable[tuple[str, list[Span]]]:
        """Of samples with the same tools and options, in one call."""
        from transformers.utils import chat_template_utils

        sample = wanted[0][0]
        if not getattr(self._tokenizer, "chat_template", None):
            raise DataError(
                f"{sample.where}: the data are chat messages, but the tokenizer has no chat template; take the "
                "model's instruct version, put its chat_template.jinja into this one's folder, or give strings"
            )
        source = self.source(sample.tools is not None)
        mark = mark and re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        try:
            rendered: Any = chat_template_utils.render_jinja_template(
                conversations=[messages for _, messages in wanted],
                tools=list(sample.tools) if sample.tools else None,
                chat_template=source,
                add_generation_prompt=opened,
                return_assistant_tokens_mask=mark,
                **{**self._variables, **sample.options},
            )
        # Templates are programs and raise what they like: unknown role, roles that do not alternate.
        except Exception as error:
            if len(wanted) > 1:
                return [one for pair in wanted for one in self._alike([pair], opened, mark)]
            raise DataError(f"{sample.where}: the chat template rejects the messages: {error}") from error
        texts, spans = rendered
        for (one, _), text in zip(wanted, texts, strict=True):
            # content was checked; roles, tools, calls and reasoning come to light here
            check_unicode(one.where, "what the chat template makes of the messages", text)
        return zip(texts, spans if mark else [[] for _ in texts], strict=True)

    def unused(self, sample: Sample, conversations: Iterable[Messages]) -> tuple[str, ...]:
        """What of a sample the template does not even mention."""
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
