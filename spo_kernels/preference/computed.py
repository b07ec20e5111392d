"""Which tokens of a batch take part in the products of policy and reference, in one wait for the device at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels.engine.checks import capturing, is_traced
from spo_kernels.engine.label_layout import LabelLayout
from spo_kernels.engine.tokens import Tokens


class HostCounts(NamedTuple):
    """What the host knows of them; None where it does not."""

    # of each sequence; while a CUDA graph is recorded all its labels are processed, where those that count are unknown
    lengths: list[int] | None
    tokens: int | None  # that take part in the policy's products
    theirs: int | None  # that take part in the reference's, where they are others


@dataclass(frozen=True)
class Computed:
    """Tokens of the policy and of the reference, in the order of the labels."""

    counted: Tensor  # labels' shape, bool: which labels count
    counts: Tensor  # [2B] how many of each sequence do
    tokens: Tokens  # that take part in the policy's products
    lengths: Tensor  # [2B] how many of them each sequence has
    host: HostCounts
    theirs: Tokens  # that take part in the reference's

    @classmethod
    def find(cls, layout: LabelLayout, weights: Tensor | None, ref_weights: Tensor | None, vocab: int) -> Computed:
        """Those that count and whose weight is not 0; without `ref_weights` the reference's are the policy's."""
        counted = layout.counted()
        counts = lengths = layout.count(counted)
        ours = counted
        if weights is not None:
            ours = counted & (weights != 0)
            lengths = layout.count(ours)
        theirs = ours if ref_weights is None else counted & (ref_weights != 0)
        host = _on_host(layout, ours, lengths, theirs, all_counted=weights is None)
        tokens = Tokens.find(layout, ours, vocab, host.tokens)
        return cls(
            counted=counted,
            counts=counts,
            tokens=tokens,
            lengths=lengths,
            host=host,
            theirs=tokens if theirs is ours else Tokens.find(layout, theirs, vocab, host.theirs),
        )


def _on_host(layout: LabelLayout, ours: Tensor, lengths: Tensor, theirs: Tensor, *, all_counted: bool) -> HostCounts:
    """What the host may know, in one wait for the device; `lengths` are of `ours`."""
    if is_traced(layout.labels):
        return HostCounts(None, None, None)
    host = layout.known_counts() if all_counted else None
    if capturing(layout.labels):
        known = None if host is None else sum(host)
        return HostCounts(layout.widths() if host is None else host, known, None)
    unknown = [] if host is not None else [lengths]
    unknown += [] if theirs is ours else [theirs.sum()[None]]
    found = torch.cat(unknown).tolist() if unknown else []
    host = found[: layout.sequences] if host is None else host
    return HostCounts(host, sum(host), None if theirs is ours else found[-1])
