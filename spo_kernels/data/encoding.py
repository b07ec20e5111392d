"""Records to token ids, through `datasets.map`: in batches, in several processes, and cached on disk."""

from __future__ import annotations

import datetime
import gc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

from spo_kernels.data.columns import COLUMNS, RESPONSES
from spo_kernels.data.common import common
from spo_kernels.data.errors import DataError
from spo_kernels.data.examples import Examples
from spo_kernels.data.records import Records
from spo_kernels.data.samples import Sample, preference_sample, repeats_prompt, sft_sample
from spo_kernels.data.template import ChatTemplate, Span
from spo_kernels.data.tokens import Tokens
from spo_kernels.data.turns import Rendered, render

# Part of the cache's key: raise it when the same records become other ids.
ENCODING = 4
# So many records decide whether responses say the prompt once more.
_LOOK_AT = 100


@dataclass(frozen=True)
class Encoding:
    """How records become token ids.

    Attributes:
        stage: "preference" (prompt, chosen, rejected) or "sft" (prompt, completion; or messages).
        max_length: limit of prompt plus response, in tokens; longer responses are cut.
        max_prompt_length: limit of the prompt (default: max_length - 1).
        drop_overlong: leave out records whose prompt is over the limit instead of raising.
        inputs: columns of numbers that the loss reads of a pair, by its name for them.
        date: what a chat template that prints the date takes for today.
    """

    stage: str = "preference"
    max_length: int = 1024
    max_prompt_length: int | None = None
    drop_overlong: bool = False
    inputs: Mapping[str, str] = field(default_factory=dict)
    date: datetime.date = field(default_factory=datetime.date.today)

    @property
    def prompt_limit(self) -> int:
        return min(self.max_prompt_length or self.max_length, self.max_length - 1)

    @property
    def responses(self) -> tuple[str, ...]:
        return RESPONSES[self.stage]

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the data that are read."""
        return (*COLUMNS[self.stage], *self.inputs.values())


def encode(
    records: Records,
    tokenizer: Any,
    encoding: Encoding,
    warn: Callable[[str], None] = lambda message: None,
    processes: int | None = None,
) -> Examples:
    """Token ids of all records.

    A sequence is prompt, response and end-of-sequence, see `tokens`. The result is memory-mapped from a file in the
    cache of `datasets`, which is found again for the same data, tokenizer and settings; `Examples.dataset` has the
    columns prompt_ids, chosen_ids and rejected_ids that TRL's trainers take.

    Args:
        records: from `read_records`.
        tokenizer: of transformers.
        encoding: the settings.
        warn: is told what was cut, dropped or not used, once each, with a count.
        processes: that encode (default: this one).

    Raises:
        DataError: the first record that can't be used, by file and line.
    """
    first = [row for _, row in islice(records, _LOOK_AT)]
    repeated = repeats_prompt(first, encoding.stage)
    dated = "strftime_now" in json.dumps(tokenizer.chat_template or "")
    key = _key(records, tokenizer, encoding, encoding.date if dated else None, repeated)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "spo_kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table = records.table.map(
            _Encoder(records, tokenizer, encoding, repeated),
            batched=True,
            with_indices=True,
            remove_columns=records.table.column_names,
            features=datasets.Features.from_arrow_schema(_schema(encoding)),
            num_proc=processes if processes and processes > 1 else None,
            cache_file_name=str(folder / f"{key}.arrow"),
            new_fingerprint=key,
            desc="encoding",
        )
    except OSError as error:
        raise DataError(f"{folder}: encoded data can't be cached ({error}); HF_DATASETS_CACHE names another") from error
    said = _forms_said(first, templated=tokenizer.chat_template is not None)
    if said is not None:
        warn(f"{records.source}: {said}")
    _report(records, table, encoding, repeated, warn)
    return Examples(table, np.flatnonzero(~_column(table, "dropped")), tuple(encoding.inputs))


class _Encoder:
    """The function that is mapped over batches of records."""

    def __init__(self, records: Records, tokenizer: Any, encoding: Encoding, repeated: bool) -> None:
        self._records, self._encoding, self._repeated = records, encoding, repeated
        self._template = ChatTemplate(tokenizer, encoding.date)
        # One more than is kept, to see that something is cut.
        self._tokens = Tokens(tokenizer, encoding.max_length + 1)
        self._known = {*encoding.columns, *records.columns}

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: list[int]) -> pyarrow.Table:
        # The collector would go over the lists of all texts again and again, a quarter of the time, to find nothing.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._table(batch, indices)
        finally:
            if collecting:
                gc.enable()

    def _table(self, batch: Mapping[str, Sequence[Any]], indices: list[int]) -> pyarrow.Table:
        samples, unused = [], []
        for where, row in self._records.rows(batch, indices):
            samples.append(self._sample(where, row))
            unused.append([name for name in row if name not in self._known])
        texts = render(self._template, samples)
        ids = self._tokens.ids([(text.prompt, *text.full) for text in texts])
        encoded = [self._encode(sample, text, *ids) for sample, text, ids in zip(samples, texts, ids, strict=True)]
        for row, text, names in zip(encoded, texts, unused, strict=True):
            row["unused"] = [*names, *text.unused]
        return _table(encoded, _schema(self._encoding))

    def _sample(self, where: str, row: dict[str, Any]) -> Sample:
        if self._encoding.stage == "sft":
            return sft_sample(where, row, self._repeated)
        return preference_sample(where, row, self._encoding.inputs, self._repeated)

    def _encode(self, sample: Sample, text: Rendered, prompt: list[int], *full: list[int]) -> dict[str, Any]:
        tokens, encoding = self._tokens, self._encoding
        n = min(common(prompt, ids) for ids in full)
        row: dict[str, Any] = {
            "merged": n < len(prompt) and not text.moved,
            "moved": text.moved,
            "lost": text.lost,
            "reopened": text.reopened,
            "changed": text.changed,
            "cut": 0,
        }
        row["key"] = int.from_bytes(hashlib.blake2b(sample.key.encode(), digest_size=8).digest(), "little", signed=True)
        row |= {f"input:{name}": value for name, value in sample.inputs.items()}
        given = not isinstance(sample.prompt, str) or full[0][: len(tokens.prefix)] == tokens.prefix
        prefix = [] if given else tokens.prefix
        if n == 0 and not prefix:
            # Nothing of the prompt would be left to predict the response from.
            full = tuple(prompt + ids for (ids,) in tokens.ids([(f[len(text.prompt) :],) for f in text.full]))
            n = len(prompt)
        length = len(prefix) + n
        kept, scored = [], []
        problem = self._prompt_problem(length)
        for k, ids in enumerate(full if problem is None else []):
            if len(ids) <= n:
                raise DataError(f"{sample.where}: response {k + 1} has no tokens")
            whole, spans = self._response(sample, text, k, ids, n)
            room = encoding.max_length - length
            row["cut"] += len(whole) > room
            kept.append(whole[:room])
            scored.append([x for a, b in spans if a < min(b, room) for x in (a, min(b, room))])
            if spans and not scored[-1]:
                problem = f"response {k + 1}: no turn of the assistant begins within --max-length {encoding.max_length}"
        if problem is not None:
            if not encoding.drop_overlong:
                raise DataError(f"{sample.where}: {problem} (--drop-overlong drops such records)")
            kept, scored = [[] for _ in full], [[] for _ in full]
        row |= {"prompt_ids": prefix + full[0][:n], "dropped": problem is not None}
        row["same"] = len(full) == 2 and problem is None and kept[0] == kept[1] and scored[0] == scored[1]
        for name, ids, places in zip(encoding.responses, kept, scored, strict=True):
            row |= {f"{name}_ids": ids, f"{name}_scored": places}
        return row

    def _prompt_problem(self, n: int) -> str | None:
        encoding = self._encoding
        more = "at least " if n > encoding.max_length else ""
        if n >= encoding.max_length:
            return f"prompt: {more}{n} tokens leave nothing of the response within --max-length {encoding.max_length}"
        if n > encoding.prompt_limit:
            return f"prompt: {n} tokens, over --max-prompt-length {encoding.prompt_limit}"
        return None

    def _response(
        self, sample: Sample, text: Rendered, k: int, full: list[int], n: int
    ) -> tuple[list[int], list[Span]]:
        """Ids of a response, and the parts that are scored: none given means all.

        End-of-sequence follows, unless the text or the chat template has ended the turn already.
        """
        tokens, ids = self._tokens, full[n:]
        places = [(0, len(ids))]
        if text.scored[k] is not None:
            spans = tokens.token_spans(text.full[k], full, text.scored[k] or [])
            places = [(max(a - n, 0), b - n) for a, b in spans if b > n]
        ends = {tokens.eos}
        if not isinstance(sample.prompt, str):
            places, ends = [(a, a + (tokens.end_of_turn(ids[a:b]) or b - a)) for a, b in places], tokens.special
        if places and places[-1][1] == len(ids) and ids[-1] not in ends:
            places[-1] = (places[-1][0], len(ids) + 1)
            ids = [*ids, tokens.eos]
        return ids, [] if places == [(0, len(ids))] else places or [(len(ids), len(ids))]


def _schema(encoding: Encoding) -> pyarrow.Schema:
    ids = pyarrow.list_(pyarrow.int32())
    fields = {"prompt_ids": ids}
    fields |= {f"{name}_{kind}": ids for name in encoding.responses for kind in ("ids", "scored")}
    fields |= {f"input:{name}": pyarrow.float64() for name in encoding.inputs}
    fields |= {"key": pyarrow.int64(), **dict.fromkeys(("cut", "lost", "changed"), pyarrow.int8())}
    fields |= dict.fromkeys(("merged", "moved", "reopened", "same", "dropped"), pyarrow.bool_())
    return pyarrow.schema(fields | {"unused": pyarrow.list_(pyarrow.string())})


def _table(rows: list[dict[str, Any]], schema: pyarrow.Schema) -> pyarrow.Table:
    def column(name: str, kind: pyarrow.DataType) -> pyarrow.Array:
        values = [row[name] for row in rows]
        if kind != pyarrow.list_(pyarrow.int32()):
            return pyarrow.array(values, kind)
        # A third of the time of pyarrow's own conversion.
        flat = np.fromiter(chain.from_iterable(values), np.int32)
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
        return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(flat))

    return pyarrow.table([column(field.name, field.type) for field in schema], schema=schema)


def _key(records: Records, tokenizer: Any, encoding: Encoding, date: datetime.date | None, repeated: bool) -> str:
    """Of everything that the ids depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = {**asdict(encoding), "date": str(date)}
    parts = [
        ENCODING,
        records.fingerprint,
        dict(records.columns),
        repeated,
        settings,
        tokenizer.get_vocab() if backend is None else backend.to_str(),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]


def _column(table: datasets.Dataset, name: str) -> np.ndarray:
    return table.data.column(name).to_numpy()


def _forms_said(rows: Sequence[Mapping[str, Any]], *, templated: bool) -> str | None:
    """What a user may not have meant: texts where the model has a chat template, or texts and messages together."""
    has_messages = [any(isinstance(v, list) and v and isinstance(v[0], dict) for v in row.values()) for row in rows]
    if any(has_messages) and not all(has_messages):
        return "some records are texts, which are encoded as they are, and some messages"
    if templated and not any(has_messages):
        return "records are texts, encoded as they are; the model's chat template is for messages"
    return None


def _report(
    records: Records, table: datasets.Dataset, encoding: Encoding, repeated: bool, warn: Callable[[str], None]
) -> None:
    names = ("dropped", "cut", "lost", "changed", "merged", "moved", "reopened", "same")
    counts = {name: int(_column(table, name).sum()) for name in names}
    listed = pyarrow.compute.list_flatten(table.data.column("unused"))
    unused = sorted({*records.unread, *pyarrow.compute.unique(listed).to_pylist()})
    if unused:
        warn(f"{records.source}: not used: {', '.join(unused)}")
    if repeated:
        warn(f"{records.source}: responses begin with their prompt, which is taken off them")
    if counts["dropped"]:
        warn(f"{counts['dropped']} of {len(table)} records dropped: over the limit")
    if counts["cut"]:
        warn(f"{counts['cut']} responses cut to --max-length {encoding.max_length}")
    if counts["merged"]:
        warn(
            f"{counts['merged']} records: a token spans the end of the prompt and the beginning of a response; it "
            "counts as the response's"
        )
    if counts["moved"]:
        warn(
            f"{counts['moved']} records: the chat template renders the prompt differently once a response follows; it "
            "is read as it stands in the whole conversation"
        )
    if counts["reopened"]:
        warn(
            f"{counts['reopened']} records: the chat template opens a reply with text that a finished turn has not (a "
            "thinking tag): what is trained on begins without it, generation with it"
        )
    if counts["changed"]:
        warn(
            f"{counts['changed']} responses: the chat template leaves out or changes part of what the assistant says; "
            "what it renders is trained on"
        )
    if counts["lost"]:
        warn(
            f"{counts['lost']} responses: the chat template renders some turns differently once others follow; they "
            "are not scored"
        )
    if counts["same"]:
        warn(f"{counts['same']} pairs have equal chosen and rejected responses within --max-length: they teach nothing")
    if counts["dropped"] == len(table):
        raise DataError(f"{records.source}: no record is left: every prompt is over the limit")
