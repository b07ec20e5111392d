"""Checks of plain arguments, numbers, flags and choices: every message names the argument and what came."""

import sys
from typing import TypeGuard

# Python's integers go on beyond what a float holds
_LARGEST = sys.float_info.max


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that a float can be, which a bool is not."""
    return isinstance(value, float) or (is_whole(value) and abs(value) <= _LARGEST)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an int, which a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    if not is_number(value) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_not_negative(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a finite number, 0 or above."""
    if not is_number(value) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number >= 0, got {value!r}")


def check_in(name: str, value: object, interval: str) -> None:
    """Raise ValueError unless `value` is a number in `interval`, written as in "[0, 0.5)"."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    inside = (
        is_number(value)
        and (value >= low if interval[0] == "[" else value > low)
        and (value <= high if interval[-1] == "]" else value < high)
    )
    if not inside:
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}")


def check_whole(name: str, value: object, least: int) -> None:
    """Raise ValueError unless `value` is a whole number of at least `least` and below 2**63."""
    if not is_whole(value) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if value >= 2**63:
        raise ValueError(f"{name} must be a whole number below 2**63, got {value}")


def check_list(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a list or a tuple."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list or a tuple, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
