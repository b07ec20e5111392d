"""What users of data can put right."""


class DataError(ValueError):
    """A record, file, data set or column that can't be used; the message names it, with file and line."""
