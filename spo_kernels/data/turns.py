"""Where the prompt ends in the rendering of a conversation, and where the assistant speaks in the response.

What is trained on is the template's rendering of the whole conversation. Its parts are what the template marks with
{% generation %}; or they are found by rendering the conversation turn by turn, as long as each is how the next begins;
or by what changes when other words stand in a turn's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from spo_kernels.data.common import common
from spo_kernels.data.errors import DataError
from spo_kernels.data.messages import Messages, Text
from spo_kernels.data.samples import Sample
from spo_kernels.data.template import ChatTemplate, Span

# Stands for what a message says: a character of no text.
_MARK = "\ue000"


@dataclass(frozen=True)
class Rendered:
    """Texts of a sample.

    Attributes:
        prompt: what all of `full` begin with.
        full: prompt and response.
        scored: the parts of each that count; None: all after the prompt.
        unused: what the sample holds and nothing can be done with.
        lost: responses with earlier turns that can't be told apart, so only the others are scored.
        moved: the template renders the prompt differently once a response follows.
        reopened: it opens a reply with more than a finished turn begins with.
        changed: responses of which it leaves out or changes what the assistant says.
    """

    prompt: str
    full: tuple[str, ...]
    scored: tuple[list[Span] | None, ...]
    unused: tuple[str, ...] = ()
    lost: int = 0
    moved: bool = False
    reopened: bool = False
    changed: int = 0


def render(template: ChatTemplate, samples: Sequence[Sample]) -> list[Rendered]:
    """Texts of samples, those of strings as they are."""
    chats = [(sample, _conversations(sample)) for sample in samples if not isinstance(sample.prompt, str)]
    whole = iter(template.texts([(s, messages) for s, conversations in chats for messages in conversations], mark=True))
    opened = iter(template.texts([(s, _messages(s.prompt)) for s, _ in chats], opened=True))
    rendered = (
        _chat(template, sample, conversations, next(opened)[0], list(islice(whole, len(conversations))))
        for sample, conversations in chats
    )
    return [_strings(sample) if isinstance(sample.prompt, str) else next(rendered) for sample in samples]


def _strings(sample: Sample) -> Rendered:
    prompt = str(sample.prompt)
    full = tuple(prompt + str(response) for response in sample.responses)
    return Rendered(prompt, full, (None,) * len(full), sample.unused)


def _chat(
    template: ChatTemplate,
    sample: Sample,
    conversations: list[Messages],
    opened: str,
    whole: list[tuple[str, list[Span]]],
) -> Rendered:
    """`opened` is the rendering of the prompt, `whole` that of each conversation."""
    full = tuple(text for text, _ in whole)
    unused = template.unused(sample, conversations)
    prompt = _beginning(template, sample, _messages(sample.prompt), opened, full)
    scored: list[list[Span] | None] = []
    lost = changed = 0
    for messages, (text, marked) in zip(conversations, whole, strict=True):
        conversation = _Conversation(template, sample, messages, text)
        own = conversation.marked(marked, prompt)
        if not own and (prompt is None or conversation.speakers != ["assistant"]):
            own, known = conversation.turns(prompt)
            lost += not known
        changed += not conversation.says_all
        scored.append(own or None)
    if prompt is not None:
        reopened = len(prompt) < len(opened)
        return Rendered(prompt, full, tuple(scored), unused, lost, reopened=reopened, changed=changed)
    end = min(*(common(full[0], text) for text in full), *(spans[0][0] for spans in scored if spans))
    return Rendered(full[0][:end], full, tuple(scored), unused, lost, moved=True, changed=changed)


def _beginning(
    template: ChatTemplate, sample: Sample, messages: Messages, opened: str, full: Sequence[str]
) -> str | None:
    """How all of `full` begin before a reply to `messages`; None where these are not rendered so once it follows.

    Some templates open a reply with text that they leave out of a finished turn (a thinking tag): then the header of
    the reply, which comes before that text, is the end.
    """
    if all(text.startswith(opened) for text in full):
        return opened
    closed = template.text(sample, messages)
    if not all(text.startswith(closed) for text in full):
        return None
    # of words that no opening shares, so that none of the reply's own are taken for its header
    try:
        reply = template.text(sample, [*messages, {"role": "assistant", "content": _MARK}])
    except DataError:
        return closed
    header = opened[: common(opened, reply)]
    return header if len(header) > len(closed) and all(text.startswith(header) for text in full) else closed


@dataclass(frozen=True)
class _Conversation:
    """A sample's prompt with one of its responses, and the rendering `full` of them."""

    template: ChatTemplate
    sample: Sample
    messages: Messages
    full: str

    @property
    def speakers(self) -> list[str]:
        """Roles of the response's messages."""
        return [message["role"] for message in self.messages[len(self.sample.prompt) :]]

    @property
    def says_all(self) -> bool:
        """Whether all that the assistant says in the response stands in the whole, but for white space around it."""
        said = [m.get("content") for m in self.messages[len(self.sample.prompt) :] if m["role"] == "assistant"]
        return all(text.strip() in self.full for text in said if isinstance(text, str))

    def marked(self, spans: list[Span], prompt: str | None) -> list[Span]:
        """Those of the template's own marks that are the response's."""
        if prompt is not None:
            return [(max(start, len(prompt)), end) for start, end in spans if end > len(prompt)]
        own = self.speakers.count("assistant")
        every = sum(message["role"] == "assistant" for message in self.messages)
        return spans[every - own :] if len(spans) == every else []

    def turns(self, prompt: str | None) -> tuple[list[Span], bool]:
        """Where the assistant speaks in the response, and whether all of its turns were found."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        own = [i for i in turns if i >= len(self.sample.prompt)]
        if not own:
            raise DataError(f"{self.sample.where}: a response without a turn of the assistant")
        spans: dict[int, Span] = {}
        after = len(prompt or "")
        # Where the prompt's end is not known, its turns are looked for too, to find the response's after them.
        for i in turns if prompt is None else own:
            span = self._span(i, after)
            if span is not None:
                spans[i], after = span, span[1]
        found = [spans[i] for i in own if i in spans]
        if not found:
            what = "the prompt" if prompt is None else "turns"
            raise DataError(
                f"{self.sample.where}: the chat template renders {what} differently once others follow, so the "
                "assistant's turns can't be found; mark them in it with {% generation %}"
            )
        return found, len(found) == len(own)

    def _text(self, n: int) -> str:
        """The first n messages as a conversation of their own."""
        return self.template.text(self.sample, self.messages[:n])

    def _span(self, i: int, after: int) -> Span | None:
        """Message i in the whole, after `after`: rendered turn by turn where each is how the next begins."""
        before = self.messages[:i]
        opened = self.template.text(self.sample, before, opened=True)
        begins = _beginning(self.template, self.sample, before, opened, [self.full])
        if begins is None:
            return self._by_mark(i, after)
        start = len(begins)
        if i + 1 == len(self.messages):
            return start, len(self.full)
        end = self._text(i + 1)
        if self.full.startswith(end):
            return start, len(end)
        found = self._by_mark(i, start)
        # Nothing but white space, which a template may leave out of a last turn, stands before it.
        return None if found is None or self.full[start : found[0]].strip() else (start, found[1])

    def _by_mark(self, i: int, after: int) -> Span | None:
        """Message i: what changes when another one stands in its place, and where that is in the whole after `after`.

        Where a part is not rendered as the whole begins: Mistral's system prompt moves to the last question, Qwen3's
        reasoning is gone once another question follows.
        """
        last, message = i + 1 == len(self.messages), self.messages[i]
        text = self.full if last else self._text(i + 1)
        for other in ({"role": message["role"]}, message):
            try:
                marked = self.template.text(self.sample, [*self.messages[:i], {**other, "content": _MARK}])
            # Without its call of a tool, say.
            except DataError:
                continue
            start = common(text, marked)
            turn, ended = text[start:], bool(marked.partition(_MARK)[2].strip())
            at = start if last else self.full.find(turn, after)
            # Words that nothing ends may also be another's.
            if turn and at >= 0 and (last or ended or self.full.count(turn, after) == 1):
                return at, at + len(turn)
        return None


def _messages(text: Text) -> Messages:
    assert not isinstance(text, str)
    return text


def _conversations(sample: Sample) -> list[Messages]:
    return [[*_messages(sample.prompt), *_messages(response)] for response in sample.responses]
