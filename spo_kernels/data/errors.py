"""What users of data can put right."""

from collections.abc import Iterable


class DataError(ValueError):
    """A record, file, data set or column that can't be used; the message names it, with file and line."""


def no_column(where: str, column: str, row: Iterable[str]) -> DataError:
    return DataError(f"{where}: no column {column!r}; the record has {', '.join(map(repr, row)) or 'none'}")
