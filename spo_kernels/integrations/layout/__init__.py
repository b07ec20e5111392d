"""Preference batches without padding, the prompt computed once for both responses: `hidden_of_pairs`."""

from spo_kernels.integrations.layout.batch import (
    LAYOUTS,
    LaidPairs,
    check_layout,
    hidden_of_pairs,
    lay_pairs,
    layout_of,
)

__all__ = ["LAYOUTS", "LaidPairs", "check_layout", "hidden_of_pairs", "lay_pairs", "layout_of"]
