"""What users of data can put right."""

from collections.abc import Collection

from spo_kernels.data.columns import RESPONSES


class DataError(ValueError):
    """A record, file, data set or column that can't be used; the message names it, with file and line."""


def no_column(where: str, column: str, row: Collection[str]) -> DataError:
    stages = [stage for stage, names in RESPONSES.items() if column not in names and all(name in row for name in names)]
    if "messages" in row and column in RESPONSES["preference"]:
        stages = ["sft"]
    hint = f"; records with these are for --stage {stages[0]}" if stages else "; --columns takes one of another name"
    return DataError(f"{where}: no column {column!r}; the record has {', '.join(map(repr, row)) or 'none'}{hint}")
