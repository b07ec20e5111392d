"""Heads whose rows, or sequences whose tokens, several processes share, against one process: `inputs.TOLERANCE`."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.sharded import MODES
from tests.processes import found_by
from tests.sharded import ranks, shapes
from tests.sharded.inputs import TOLERANCE

Found = dict[str, Any]

# parts of what every process is to say, or what each of the two
REFUSED = {
    "labels": "labels must be the same on all processes of head.weight's vocab_group",
    "label": "labels[0, 0] = 300 is outside [0, 300)",
    "rows": "head.weight: process 1 of its vocab_group has no rows",
    "width": "head.weight: H is 16 on process 0 of its vocab_group, 15 on 1",
    "workspace": "workspace_bytes, backend and sparsity must be the same on all processes of head's vocab_group",
    "backend": "workspace_bytes, backend and sparsity must be the same on all processes of head's vocab_group",
    "path": "path = 'packed' cannot be taken: the workspace is too small",
    "paths": "path must be the same on all processes of head's vocab_group",
    "frozen": "head must be the same on all processes of head's vocab_group",
    "frozen hidden": "hidden must be the same on all processes of head's vocab_group",
    "no_grad": "head must be the same on all processes of head's vocab_group",
    "metrics": "token_metrics must be the same on all processes of head's vocab_group",
    "outputs": "outputs must be the same on all processes of head's vocab_group",
    "weights": "token_weights must be the same on all processes of head's vocab_group",
    "weights of other tokens": "token_weights must be the same on all processes of head's vocab_group",
    "offsets": "pair_inputs['offset'] must be the same on all processes of head's vocab_group",
    "references of tokens": "the shape of ref_logps must be the same on all processes of head's vocab_group",
    "softcap": "head must be the same on all processes of head's vocab_group",
    "dtype": "head must be the same on all processes of head's vocab_group",
    "objectives": "loss must be the same on all processes of head's vocab_group",
    "hyperparameters": "loss must be the same on all processes of head's vocab_group",
    "functions": "the function must be the same on all processes of head's vocab_group",
    "plain reference": "ref_head is a plain weight, but head has a vocab_group",
    "whole reference": "ref_head must be split like head",
    "other reference": "ref_head must be split like head",
    "dropout": "head.lora[0] has dropout, which would differ between the processes",
    "accumulate": "accumulate=True cannot be used: there are several processes",
    "traced": "head has a vocab_group, whose processes talk to each other: that is not traced",
    "scores": "head has a vocab_group; scores multiply rows of all processes",
    "group": "vocab_group must be a process group that this process is in, got int",
    "streamed, width": "head.weight: H is 16 on process 0 of its shard_group, 15 on 1",
    "streamed, rows": "head.weight must not be empty on all processes of its shard_group",
    "streamed, bias": "head.weight: some processes of its shard_group have a bias, others none",
    "streamed, workspace": "options, dtypes and what needs a gradient must be the same on all processes of head's",
    "streamed, frozen": "options, dtypes and what needs a gradient must be the same on all processes of head's",
    "streamed, sparsity": "sparsity must be 'exact' where head has a shard_group, got 'certified'",
    "streamed, path": "path = 'packed' cannot be taken: rows of a head with a shard_group pass by in slices",
    "streamed, kl": "a KL divergence looks at the same rows of two heads at a time",
    "streamed, plain reference": "ref_head is a plain weight, but head has a shard_group",
    "streamed, accumulate": "accumulate=True",
    "streamed, adapters": "head has a shard_group, whose rows pass by in slices, and adapters: leave one of them",
    "streamed, traced": "head has a shard_group, whose processes talk to each other: that is not traced",
    "streamed, scores": "head has a shard_group; scores multiply rows of all processes",
    "both groups": "vocab_group and shard_group both say who has the rows: give one of them",
    "shift": "shift: head has a sequence_group",
    "sequences": "the number of sequences must be the same on all processes of head's sequence_group",
    "sequences, workspace": "must be the same on all processes of head's sequence_group",
    "sequences, metrics": "token_metrics must be the same on all processes of head's sequence_group",
    "sequences, paths": "path must be the same on all processes of head's sequence_group",
    "sequences, frozen": "head must be the same on all processes of head's sequence_group",
    "sequences, references": "ref_logps must be the same on all processes of head's sequence_group",
    "sequences, references of tokens": "the shape of ref_logps must be the same on all processes of head's sequence",
    "sequences, drawn": "the objective draws tokens of whole responses",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    """What a number of processes left; each is launched once."""
    known: dict[int, Found] = {}

    def of(world: int) -> Found:
        if world not in known:
            folder = tmp_path_factory.mktemp(f"ranks{world}")
            known[world] = found_by("tests.sharded.ranks", world, folder, ranks.WATCHDOG)
        return known[world]

    return of


@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_find_what_one_finds(found: Callable[[int], Found], world: int) -> None:
    """Values, metrics and every gradient, for three objectives, on every path; one without tokens or pairs."""
    groups = (
        ("vocabulary", "tokens", "streamed", "sparse", "decided")
        if world == 2
        else ("vocabulary", "tokens", "streamed", "both", "replicas")
    )
    for group in groups:
        cases = {name: errors for name, errors in found(world).items() if name.startswith(group)}
        assert cases
        errors = {(name, key): error for name, of in cases.items() for key, error in of.items() if "kept" not in key}
        off = {name: error for name, error in errors.items() if not error <= TOLERANCE}
        assert not off


def test_a_sparse_backward_is_decided_on_together(found: Callable[[int], Found]) -> None:
    """Where one process alone would keep everything and the other nothing; both know the whole share."""
    for frozen in (False, True):
        for name, share in (("sparse", 0.5), ("exact", 1.0)):
            case = found(2)[f"decided {name}, {frozen}"]
            assert case["kept"] == -case["minus kept"] == share


def test_what_a_sparse_backward_leaves_out(found: Callable[[int], Found]) -> None:
    """No more than the tolerance allows; and no bias: errors of many seeds average out as independent ones do."""
    assert 0.1 < found(2)["certified"]["of the bound"] < 1.0
    assert 0.5 < found(2)["unbiased"]["of the draws' error"] < 2.0
    for mode in ("certified", "unbiased"):
        assert found(2)[mode]["kept"] == -found(2)[mode]["minus kept"] < 0.5


def test_nothing_as_large_as_the_head_moves(found: Callable[[int], Found]) -> None:
    """Beyond what the formula counts, 100 bytes of agreement; else the head out, once or twice, its gradient back."""
    beyond = found(2)["traffic"]
    assert all(0 <= beyond[f"sent, {mode}"] < 200 for mode in MODES)
    assert beyond["held, vocabulary"] < 20_000


def test_two_slices_of_a_streamed_head(found: Callable[[int], Found]) -> None:
    """Beside the workspace, and gradients of this process's rows and hidden states; one slice more would not fit."""
    case = found(2)["traffic"]
    assert case["held, streamed"] <= 0 and 0 < case["slice"] < 0.2


@pytest.mark.parametrize("name", REFUSED)
def test_all_processes_refuse(found: Callable[[int], Found], name: str) -> None:
    for said in found(2)["refused"][name]:
        assert REFUSED[name] in said


def test_no_deadlock(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Drawn shapes, lengths, budgets and objectives; where one process cannot, all say why."""
    errors = found_by("tests.sharded.shapes", 2, tmp_path_factory.mktemp("shapes"), shapes.WATCHDOG)
    said = [error for error in errors.values() if isinstance(error, str)]
    assert len(errors) == shapes.CALLS and len(said) < 0.2 * shapes.CALLS
    assert all("cannot be taken" in error or "has no rows" in error for error in said), said
    assert not {seed: error for seed, error in errors.items() if not isinstance(error, str) and not error <= 5e-6}
