"""The exceptions that the command line turns into a message without a traceback."""


class TrainError(Exception):
    """Something the user can put right: an option, a file, a record, a model that can't be used."""


class StorageError(TrainError):
    """Something can't be written: a full disk, a folder without permission."""
