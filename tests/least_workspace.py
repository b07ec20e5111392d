"""The smallest workspace that a function accepts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from spo_kernels.testing import Batch


def least_workspace(
    function: Callable[..., Any],
    batch: Batch,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **options: Any,
) -> int:
    """The smallest `workspace_bytes` that `function` accepts for the batch, as its refusal of a single byte states."""
    head = batch.head(logit_scale=logit_scale, logit_softcap=logit_softcap)
    try:
        function(batch.hidden, head, batch.labels, workspace_bytes=1, **options)
    except ValueError as error:
        found = re.search(r"workspace_bytes = 1 is too small.* need (\d+) bytes", str(error))
        if found is None:
            raise
        return int(found[1])
    return 1
