"""The list of variants, in the order of the table, and the choice among them."""

from __future__ import annotations

from fnmatch import fnmatchcase

from . import naive, peers
from .floor import Layout, floor_variants
from .ours import PREFIX, our_variant, our_variants
from .settings import Setting
from .variant import Variant


def all_variants(setting: Setting, layouts: dict[str, Layout] | None = None) -> dict[str, Variant]:
    listed = [*floor_variants(setting, layouts), *naive.VARIANTS, *peers.VARIANTS, *our_variants(setting)]
    return {variant.name: variant for variant in listed}


def find(name: str, setting: Setting, layouts: dict[str, Layout] | None) -> Variant:
    """One variant by name. A peer's process never imports this library: its memory is the peer's alone."""
    if name.startswith(PREFIX):
        return our_variant(name.removeprefix(PREFIX))
    listed = [*floor_variants(setting, layouts), *naive.VARIANTS, *peers.VARIANTS]
    return next(variant for variant in listed if variant.name == name)


def select(names: list[str], patterns: str) -> list[str]:
    """The names that match the comma-separated shell patterns, in table order.

    Raises:
        ValueError: a pattern matches nothing.
    """
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"--variants {pattern!r} matches none of: {', '.join(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]
