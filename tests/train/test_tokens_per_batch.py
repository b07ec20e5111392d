"""`--tokens-per-batch`: forwards of as many pairs as a budget of tokens holds, and the mean over the step's pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spo_kernels.integrations import token_batches
from spo_kernels.integrations.token_batches import TokenBatchSampler, TokenBudget
from spo_kernels.train.policy import Policy, SFTPolicy

from .conftest import Fails, Train, assert_close_weights, read_metrics

STEPS = ("--max-steps", 3, "--learning-rate", 1e-2, "--logging-steps", 1, "--eval-fraction", 0.2)
LENGTHS = [tuple(row) for row in np.random.default_rng(0).integers(1, 40, (50, 3)).tolist()]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_forwards_hold_every_record_once_within_the_budget(layout: str) -> None:
    budget = TokenBudget(250, layout)
    forwards = budget.forwards(LENGTHS)
    assert sorted(i for forward in forwards for i in forward) == list(range(50))
    for forward in forwards:
        longest = max(LENGTHS[i][0] + max(LENGTHS[i][1:]) for i in forward)
        prompts = sum(LENGTHS[i][0] for i in forward) * (2 if layout == "packed" else 1)
        tokens = prompts + sum(sum(LENGTHS[i][1:]) for i in forward)
        assert (2 * len(forward) * longest if layout == "padded" else tokens) <= 250
    least = sum(map(budget.cost, LENGTHS)) / 250
    assert least <= len(forwards) <= (1.4 if layout == "padded" else 1.1) * least + 1


def test_processes_share_a_step_evenly() -> None:
    budget = TokenBudget(200)
    shares = [budget.share(LENGTHS, rank, 3) for rank in range(3)]
    dealt = [[i for forward in share for i in forward] for share in shares]
    assert sorted(i for mine in dealt for i in mine) == list(range(50))
    tokens = [sum(budget.cost(LENGTHS[i]) for i in mine) for mine in dealt]
    assert max(tokens) - min(tokens) <= max(map(budget.cost, LENGTHS))
    # as many records as processes: one each
    assert [len(budget.share(LENGTHS[:3], rank, 3)) for rank in range(3)] == [1, 1, 1]


def test_sampler_goes_on_where_it_stopped() -> None:
    def sampler(**more: int) -> TokenBatchSampler:
        return TokenBatchSampler(LENGTHS, 200, pairs_per_step=12, **{"steps": 6, "seed": 3, **more})

    steps = list(sampler().by_step())
    assert len(steps) == 6 and all(len({i for batch in batches for i in batch}) == 12 for batches in steps)
    assert list(sampler()) == [batch for batches in steps for batch in batches]
    of_numpy = TokenBatchSampler(np.array(LENGTHS), 200, pairs_per_step=12, steps=6, seed=3)  # type: ignore[arg-type]
    assert list(of_numpy.by_step()) == steps
    assert list(sampler(start=4).by_step()) == steps[4:] != steps[:2]
    assert list(sampler(seed=4).by_step()) != steps
    both = [list(sampler(rank=rank, world_size=2).by_step()) for rank in range(2)]
    for step, *shares in zip(steps, *both, strict=True):
        assert sorted(i for share in shares for batch in share for i in batch) == sorted(i for b in step for i in b)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens_per_batch": 0}, "tokens_per_batch must be a whole number of at least 1, got 0"),
        ({"tokens_per_batch": 60}, r"60 tokens does not hold the longest record, \d+ tokens \(shared layout\)"),
        ({"layout": "auto"}, "layout must be one of 'padded', 'packed', 'shared', got 'auto'"),
        ({"rank": 2, "world_size": 2}, "rank must be at least 0 and below world_size 2, got 2"),
        ({"pairs_per_step": 1, "world_size": 2}, "pairs_per_step must be at least world_size 2, got 1"),
        ({"start": 9}, "start must be at least 0 and at most steps 6, got 9"),
        ({"lengths": []}, "lengths must have one entry at least"),
        ({"lengths": [12, 40]}, r"tokens of the prompt and of each response .* got lengths\[0\] = 12"),
        ({"lengths": [(12, 40), (3,)]}, r"got lengths\[1\] = \(3,\)"),
        ({"lengths": [(12, 4.5)]}, r"got lengths\[0\] = \(12, 4.5\)"),
    ],
)
def test_sampler_names_what_is_wrong(wrong: dict[str, object], message: str) -> None:
    given = {"lengths": LENGTHS, "tokens_per_batch": 200, "pairs_per_step": 12, "steps": 6, **wrong}
    with pytest.raises(ValueError, match=message):
        TokenBatchSampler(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "options", "tokens"),
    [
        ("shared", (), 30),
        ("packed", ("--layout", "packed"), 75),
        ("padded", ("--layout", "padded"), 100),
        ("reference", ("--reference", "online"), 30),
        ("sft", ("--stage", "sft"), 40),
    ],
)
def test_equals_one_big_batch(
    train: Train,
    tmp_path: Path,
    pairs_file: Path,
    sft_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    options: tuple[str, ...],
    tokens: int,
) -> None:
    """The gradient of each step is that of all of its pairs at once, however many forwards there are."""
    kind = SFTPolicy if case == "sft" else Policy
    forward, seen = kind.forward, []

    def counted(self: Policy, input_ids: object, labels: object, *rest: object, **more: object) -> object:
        if self.training:
            seen.append(len(labels) // (1 if case == "sft" else 2))  # type: ignore[arg-type]
        return forward(self, input_ids, labels, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "forward", counted)
    given = (*STEPS, *options, *(() if case == "sft" else ("--loss", "dpo")))
    data = sft_file if case == "sft" else pairs_file
    one, split = tmp_path / "one", tmp_path / "split"
    assert train(*given, "--batch-size", 12, dataset=data, output_dir=one) == 0
    assert seen == [12] * 3
    seen.clear()
    budget = ("--batch-size", 6, "--grad-accum", 2, "--tokens-per-batch", tokens)
    assert train(*given, *budget, dataset=data, output_dir=split) == 0
    assert sum(seen) == 36 and len(seen) > 6 and len(set(seen)) > 1, seen
    for a, b in zip(read_metrics(one), read_metrics(split), strict=True):
        assert a.keys() == b.keys() and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        # Adam hides a wrong scale of the loss; the norm shows it
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-4)
    assert_close_weights(one, split, atol=3e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens-per-batch", 0), "--tokens-per-batch must be at least 1, got 0"),
        (("--tokens-per-batch", 9, "--loss", "dpo"), "does not hold the longest record, "),
        (("--tokens-per-batch", 99, "--loss", "bco"), "--loss bco depends on which pairs are in a forward together"),
        (
            ("--tokens-per-batch", 99, "--spo-penalty", "hinge", "--spo-inner-steps", 1, "--spo-inner-lr", 0.1),
            "--spo-inner-steps takes steps on the pairs of a forward",
        ),
    ],
)
def test_what_does_not_go_together(fails: Fails, options: tuple[object, ...], message: str) -> None:
    assert message in fails(*options)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        (("--loss", "dpo"), 3),
        (("--loss", "bco"), 6),  # whose loss is of all pairs of a forward
        (("--loss", "spo", "--spo-penalty", "hinge", "--spo-inner-steps", 1, "--spo-inner-lr", 0.1), 6),
    ],
    ids=["split", "coupled", "inner-steps"],
)
def test_a_cpu_splits_large_forwards_and_joins_none(
    train: Train,
    tmp_path: Path,
    pairs_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    most: int,
) -> None:
    """Where no budget is given: gradient and metrics of the whole; no forward has more pairs than was asked for."""
    forward, seen = Policy.forward, []

    def counted(self: Policy, input_ids: object, labels: object, *rest: object, **more: object) -> object:
        if self.training and torch.is_grad_enabled():
            seen.append(len(labels) // 2)  # type: ignore[arg-type]
        return forward(self, input_ids, labels, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Policy, "forward", counted)
    given = (*STEPS, *options, "--batch-size", 6, "--grad-accum", 2)
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert train(*given, dataset=pairs_file, output_dir=whole) == 0
    assert seen == [6] * 6
    seen.clear()
    monkeypatch.setattr(token_batches, "CPU_TOKENS", 1)
    assert train(*given, dataset=pairs_file, output_dir=split) == 0
    assert sum(seen) == 36 and max(seen) <= most and (len(seen) > 6) == (most < 6), seen
    for a, b in zip(read_metrics(whole), read_metrics(split), strict=True):
        assert a.keys() == b.keys() and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-4)
