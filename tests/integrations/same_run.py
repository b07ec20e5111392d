"""Whether two short trainings were the same: losses, logged metrics, and where the weights went."""

from typing import Any

import pytest

TIMES = ("time", "runtime", "per_second", "total_flos")


def assert_same(ours: Any, trls: Any) -> None:
    # losses of GRPO and RLOO are sums of advantages of size 1 that cancel
    assert ours.losses == pytest.approx(trls.losses, rel=1e-5, abs=1e-7 if min(trls.losses) > 0 else 1e-6)
    assert len(ours.logs) == len(trls.logs) > 0
    for found, expected in zip(ours.logs, trls.logs, strict=True):
        metrics = {key: value for key, value in expected.items() if not any(time in key for time in TIMES)}
        if is_at_its_reference(expected):
            # which of two roundings of zero is larger
            del metrics["rewards/accuracies"]
        assert {key: found[key] for key in metrics} == pytest.approx(metrics, rel=1e-4, abs=1e-4, nan_ok=True)
    moved, apart = (
        sum((trls.end[key] - other[key]).square().sum() for key in trls.end).sqrt().item()
        for other in (trls.start, ours.end)
    )
    assert moved > 0 and apart <= 1e-3 * moved


def is_at_its_reference(metrics: dict[str, float]) -> bool:
    """Whether a model's log-probabilities are still those of the reference, but for rounding."""
    rewards = [abs(metrics[key]) for key in ("rewards/chosen", "rewards/rejected") if key in metrics]
    return bool(rewards) and max(rewards) < 1e-6
