"""Records of a file or data set, of which only the needed columns are read; complaints name file and line.

A .jsonl file (one object a line) stays where it is: the table holds the byte range of each line. A .json file is an
array of objects, or JSON lines. Anything else is read by `datasets`: .parquet, a folder written by save_to_disk, and
what `load_dataset` understands.
"""

from __future__ import annotations

import glob
import hashlib
import json
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from spo_kernels.data.errors import DataError, no_column

Row = dict[str, Any]
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

FILE_TYPES = (".jsonl", ".json", ".parquet")
# Endings that say "a file", so that a typo is not looked up on the hub.
OTHER_FILE_TYPES = frozenset({".csv", ".tsv", ".txt", ".gz", ".zip", ".zst", ".arrow", ".yaml", ".xml", ".pkl", ".pt"})


@dataclass(frozen=True)
class Records:
    """A table for `datasets.map`, and how its rows become records.

    Attributes:
        table: the records' columns; or of a JSON file, each record's text (`text`), or byte range (`start`, `length`).
        source: what complaints call the data; then follows the record's line, or its number.
        fingerprint: of the content.
        numbers: line of each record, where it is one of a file.
        unread: columns of the data that were left out because nothing needs them.
        path: the file that byte ranges are of.
        columns: the column of the data for each name that is another one there.
    """

    source: str
    table: datasets.Dataset
    fingerprint: str
    numbers: Sequence[int] | None = None
    unread: tuple[str, ...] = ()
    path: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.table):
            raise DataError(f"{self.source}: no records in it")

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for start in range(0, len(self), 1000):
            yield from self.rows(self.table[start : start + 1000], range(start, len(self)))

    def rows(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> Iterator[tuple[str, Row]]:
        """(where, record) for the rows of a batch, whose positions in the table are `indices`."""
        if self.path is not None:
            contents = _read_ranges(self.path, batch["start"], batch["length"])
        elif "text" in batch and self.table.column_names == ["text"]:
            contents = (text.encode() for text in batch["text"])
        else:
            for i, values in zip(indices, zip(*batch.values(), strict=True), strict=False):
                where = f"{self.source}: record {i + 1}"
                yield where, self._named(where, _without_nulls(dict(zip(batch, values, strict=True))))
            return
        for i, content in zip(indices, contents, strict=False):
            where = f"{self.source}: record {i + 1}" if self.numbers is None else f"{self.source}:{self.numbers[i]}"
            yield where, self._named(where, _parse(content, where))

    def _named(self, where: str, row: Any) -> Row:
        """The record under the names that the rest of the program knows."""
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object with named fields, got {type(row).__name__}")
        if not self.columns:
            return row
        for column in self.columns.values():
            if column not in row:
                raise no_column(where, column, row)
        taken = {*self.columns, *self.columns.values()}
        named = {name: row[column] for name, column in self.columns.items()}
        return {name: value for name, value in row.items() if name not in taken} | named


def check_source(source: str, config: str | None = None) -> None:
    """Raise DataError for a file that is not there, or not of a kind that is read; data sets are not looked for."""
    path = Path(source).expanduser()
    if not _is_file(path):
        return
    if path.suffix.lower() not in FILE_TYPES:
        raise DataError(f"{source}: unknown file type {path.suffix.lower()!r}; expected one of {', '.join(FILE_TYPES)}")
    if not path.is_file():
        raise DataError(f"{source}: no such file")
    if config is not None:
        raise DataError(f"{source}: a file has no configurations; leave --dataset-config out")


def _is_file(path: Path) -> bool:
    """Whether it names a file, which need not be there; other names are those of data sets."""
    return not path.is_dir() and (path.exists() or path.suffix.lower() in (*FILE_TYPES, *OTHER_FILE_TYPES))


def read_records(
    source: str,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    needed: Collection[str] | None = None,
) -> Records:
    """Open a file or data set.

    Args:
        source: .jsonl, .json or .parquet file, folder, or data set of the hub.
        split: of a data set; files have none.
        config: configuration of a data set that has several.
        columns: name to column, where the data call `chosen` something else.
        needed: names of columns to read (default: all).

    Raises:
        DataError: it does not exist, is damaged, or holds no record.
    """
    columns = dict(columns or {})
    check_source(source, config)
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    wanted = None if needed is None else {columns.get(name, name) for name in needed}
    if not _is_file(path):
        records = _select(f"{source}[{split}]", _load(source, split, config), wanted, columns)
    elif suffix == ".parquet":
        records = _load_parquet(path, wanted, columns)
    elif suffix == ".json" and _first_byte(path) == b"[":
        records = as_records(_parse(_read(path).removeprefix(_BYTE_ORDER_MARK), str(path)), str(path), columns)
    else:
        # Hub data sets often hold JSON lines in a file called .json.
        records = _json_lines(path, columns)
    return records


def as_records(
    data: datasets.Dataset | Sequence[Row],
    source: str = "data",
    columns: Mapping[str, str] | None = None,
    needed: Collection[str] | None = None,
) -> Records:
    """Records that are in memory, or in a data set of `datasets`; `source` is what complaints call them.

    Raises:
        DataError: there is none, or JSON can't hold one.
    """
    columns = dict(columns or {})
    if isinstance(data, datasets.Dataset):
        wanted = None if needed is None else {columns.get(name, name) for name in needed}
        return _select(source, data, wanted, columns)
    texts = [_dump(row, f"{source}: record {i}") for i, row in enumerate(data, start=1)]
    table = datasets.Dataset(pyarrow.table({"text": pyarrow.array(texts, pyarrow.large_string())}))
    return Records(source, table, hashlib.sha256("\n".join(texts).encode()).hexdigest(), columns=columns)


def _json_lines(path: Path, columns: Mapping[str, str]) -> Records:
    """Where each line is; the file is never in memory as a whole."""
    starts, lengths, numbers, position = array("q"), array("q"), array("q"), 0
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                skipped = len(_BYTE_ORDER_MARK) if number == 1 and line.startswith(_BYTE_ORDER_MARK) else 0
                if line[skipped:].strip():
                    starts.append(position + skipped)
                    lengths.append(len(line) - skipped)
                    numbers.append(number)
                position += len(line)
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error
    table = datasets.Dataset(pyarrow.table({"start": pyarrow.array(starts), "length": pyarrow.array(lengths)}))
    return Records(str(path), table, digest.hexdigest(), numbers, path=path, columns=columns)


def _select(
    source: str, table: datasets.Dataset, wanted: Collection[str] | None, columns: Mapping[str, str]
) -> Records:
    names = [name for name in table.column_names if wanted is None or name in wanted]
    unread = tuple(name for name in table.column_names if name not in names)
    # A data set without a single needed column keeps its rows, so that the first is complained about.
    table = table.with_format(None).select_columns(names or table.column_names[:1])
    return Records(source, table, table._fingerprint, unread=unread, columns=columns)


def _load_parquet(path: Path, wanted: Collection[str] | None, columns: Mapping[str, str]) -> Records:
    try:
        # A parquet file is converted once, so only what is needed. Its name is taken for a pattern.
        names = pyarrow.parquet.read_schema(path).names
        needed = [name for name in names if wanted is None or name in wanted] or names[:1]
        table = datasets.Dataset.from_parquet(glob.escape(str(path)), columns=needed)
    # Dataset.from_parquet wraps what pyarrow says in exceptions of its own.
    except (OSError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    unread = tuple(name for name in names if name not in needed)
    return Records(str(path), table, table._fingerprint, unread=unread, columns=columns)


def _load(source: str, split: str, config: str | None) -> datasets.Dataset:
    folder = Path(source).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            if config is not None:
                raise DataError(f"{source}: what save_to_disk wrote has no configurations; leave --dataset-config out")
            table = datasets.load_from_disk(folder)
            if isinstance(table, datasets.DatasetDict):
                if split not in table:
                    raise DataError(f"{source}: no split {split!r}; it has {', '.join(table)}")
                table = table[split]
            return table
        return datasets.load_dataset(source, config, split=split)
    except DataError:
        raise
    # load_dataset raises many types (missing, gated, offline, no such split); all are about this name.
    except Exception as error:
        raise DataError(f"data set {source!r}, split {split!r}: {_reason(source, config, error)}") from error


def _reason(source: str, config: str | None, error: Exception) -> str:
    try:
        configs = datasets.get_dataset_config_names(source)
    # Not there at all: the first error says so.
    except Exception:
        configs = []
    if len(configs) > 1 and config not in configs:
        given = "it has several configurations" if config is None else f"no configuration {config!r}"
        return f"{given}; --dataset-config takes one of {', '.join(configs)}"
    hint = "" if configs or Path(source).exists() else "; if a local file was meant, it does not exist"
    told = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if error.__cause__ is not None:  # "An error occurred while generating the dataset" alone helps nobody
        told += f": {type(error.__cause__).__name__}: {' '.join(str(error.__cause__).split())[:300]}"
    return f"can't be loaded ({told}){hint}"


def _read_ranges(path: Path, starts: Sequence[int], lengths: Sequence[int]) -> Iterator[bytes]:
    with path.open("rb") as file:
        for start, length in zip(starts, lengths, strict=True):
            file.seek(start)
            yield file.read(length).removesuffix(b"\n")


def _first_byte(path: Path) -> bytes:
    return _read(path, 4096).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1]


def _read(path: Path, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON, or cut off: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from error
    # Brackets in brackets beyond Python's stack, or an integer of more digits than Python converts.
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: JSON that can't be read: {error}") from error


def _dump(row: Any, where: str) -> str:
    try:
        return json.dumps(row)
    # What JSON has no word for, an object in itself, or one in another beyond Python's stack.
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: not what JSON can hold: {error}") from error


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct the keys of all the others, with nulls: those of a tool's arguments never existed."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
