"""Running statistics: changed by training only, once a batch, saved and restored through any wrapper."""

import numpy as np
import pytest
import torch

from spo_kernels import fused_spo_loss
from spo_kernels.losses import SPO, DrDPO, WeightedSum, build_loss, needs_inputs, needs_reference
from spo_kernels.losses.draws import draw_without_replacement, uniforms
from spo_kernels.losses.state import RunningState, batch_moments, gathered
from spo_kernels.testing import random_batch
from tests.processes import Forked, exit_codes

from .batch_forms import beta_kept, splitmix64, uniform_numbers
from .closed_forms import Points, logsig
from .points import as_pairs, random_points

STATEFUL = ("alpha_dpo_code", "bco", "beta_dpo", "dpo_shift_linear")
each_stateful = pytest.mark.parametrize("name", STATEFUL)


def losses_of(objective, seed):
    return objective(as_pairs(random_points(8, seed))).detach()


@each_stateful
def test_three_batches(name):
    """Against the recurrences, written out."""
    objective, mean, std = build_loss(name), 0.0, 0.0
    for step in range(3):
        x = random_points(8, step)
        if name == "alpha_dpo_code":
            gap = x.r_w / x.n_w - x.r_l / x.n_l
            mean, std = 0.9 * mean + 0.1 * gap.mean(), 0.9 * std + 0.1 * gap.std(ddof=1)
            truth = -logsig(2.5 * (x.p_w / x.n_w - x.p_l / x.n_l - 0.6 - 0.2 * (gap - mean) / std))
        elif name == "bco":
            batch_mean = 0.1 * np.concatenate([x.r_w, x.r_l]).mean()
            mean += (batch_mean - mean) / (step + 1)
            truth = -logsig(0.1 * x.r_w - mean) - logsig(mean - 0.1 * x.r_l)
        elif name == "beta_dpo":
            mean, std = 0.9 * mean + 0.1 * x.delta.mean(), 0.9 * std + 0.1 * x.delta.std(ddof=1)
            kept = beta_kept(x.delta, mean, std, 0.8, 0, step)
            beta = max(1e-3, 0.1 * (1 + 0.6 * (x.delta[kept].mean() - mean)))
            truth = np.where(np.isin(np.arange(8), kept), -8 / 6 * logsig(beta * x.delta), 0)
        else:
            truth = -logsig(0.01 * (x.r_w - (1 - 0.5 * step / 1000) * x.r_l))
        np.testing.assert_allclose(losses_of(objective, step).numpy(), truth, rtol=1e-10)


@each_stateful
def test_evaluation_changes_nothing(name):
    objective = build_loss(name)
    losses_of(objective, 0)
    before = objective.state_dict()
    with torch.no_grad():
        losses_of(objective, 1)
    with torch.inference_mode():
        losses_of(objective, 1)
    assert objective.state_dict() == before
    assert needs_reference(objective) and needs_inputs(objective) == ()
    assert objective.state_dict() == before, "asking what it needs is not training either"


WRAPPERS = {
    "itself": lambda objective: objective,
    "spo": SPO,
    "spo-dr_dpo": lambda objective: SPO(DrDPO(objective)),
    "sum": lambda objective: WeightedSum((build_loss("dpo"), objective, build_loss("sft")), (1, 1, 1)),
}


@each_stateful
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_resumed_like_never_stopped(name, wrap):
    straight = wrap(build_loss(name))
    losses_of(straight, 0)
    losses_of(straight, 1)
    saved = straight.state_dict()
    assert saved and all(value.ndim == 0 and value.device.type == "cpu" for value in saved.values())
    resumed = wrap(build_loss(name))
    resumed.load_state_dict(saved)
    losses_of(straight, 2)
    assert saved == resumed.state_dict(), "a saved state is a copy"
    losses_of(resumed, 2)
    assert torch.equal(losses_of(straight, 3), losses_of(resumed, 3))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_foreign_state_is_refused(wrap):
    with pytest.raises(ValueError, match=r"state has \['wrong'\], expected \['"):
        wrap(build_loss("bco")).load_state_dict({"wrong": torch.zeros(())})


def test_objects_do_not_share_their_state():
    first, second = build_loss("bco"), build_loss("bco")
    losses_of(first, 0)
    assert first.state_dict() != second.state_dict() and first == second


def test_no_state():
    assert SPO().state_dict() == {}
    SPO().load_state_dict({})


@each_stateful
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_once_a_batch(name, reduction):
    """Through fused_spo_loss, with a trained head too."""
    batch = random_batch((6, 5), 17, 8)
    reference = torch.linspace(-20, -10, 6)
    objective, other = build_loss(name), build_loss(name)
    loss, _ = fused_spo_loss(
        batch.hidden.requires_grad_(),
        batch.weight.requires_grad_(),
        batch.labels,
        ref_logps=reference,
        loss=objective,
        reduction=reduction,
    )
    loss.sum().backward()
    spied = []
    fused_spo_loss(
        batch.hidden, batch.weight, batch.labels, ref_logps=reference, loss=lambda p: spied.append(p) or p.chosen
    )
    other(spied[0])
    assert objective.state_dict() == other.state_dict()


def test_running_state():
    state = RunningState(mean=1.0)
    like = torch.zeros((), dtype=torch.float32)
    assert state.get("mean", like).dtype == torch.float32
    state.update(mean=torch.tensor(2.0, requires_grad=True))
    assert state.get("mean", like) == 2 and not state.get("mean", like).requires_grad


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_batch_moments(count):
    values = torch.arange(count, dtype=torch.float64) ** 2
    mean, std = batch_moments(values)
    assert mean == (values.mean() if count else 0)
    assert torch.allclose(std, values.std() if count > 1 else torch.zeros((), dtype=torch.float64))


def test_a_schedule_ends():
    objective = build_loss("dpo_shift_linear", first=0.5, last=1.0, batches=2.0)
    for step, shift in enumerate((0.5, 0.75, 1.0, 1.0)):
        assert torch.equal(losses_of(objective, step), losses_of(build_loss("dpo_shift", shift=shift), step))


def test_uniform_numbers():
    """The generator's published first output from 0, and the stream written out in plain integers."""
    step = torch.zeros((), dtype=torch.float64)
    assert splitmix64(0, 1) == [0xE220A8397B1DCDAF]
    for seed, number in ((0, 0), (12345, 3), (2**63 - 1, 1000)):
        found = uniforms(100, seed, step + number)
        np.testing.assert_array_equal(found, uniform_numbers(100, seed, number))
        assert found.min() > 0 and found.max() < 1


def test_draws_have_their_weights():
    """Of three with weights 1, 2 and 5, two one after the other: each ordered pair as often as it should be."""
    weights = torch.tensor([1.0, 2.0, 5.0])
    runs, counts = 1000, {}
    for step in range(runs):
        drawn = tuple(draw_without_replacement(weights.log(), 2, 1, torch.tensor(float(step))).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    for (first, second), count in counts.items():
        share = weights[first] / 8 * weights[second] / (8 - weights[first])
        assert abs(count - runs * share) < 4.5 * (runs * share * (1 - share)) ** 0.5
    assert len(counts) == 6


def _process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    parts = (torch.tensor([1.0, 5.0, 2.0]), torch.tensor([-3.0, 7.0]))
    mean, std = batch_moments(parts[rank])
    both = torch.cat(parts)
    torch.testing.assert_close(mean, both.mean())
    torch.testing.assert_close(std, both.std())
    with torch.no_grad():
        assert batch_moments(parts[rank])[0] == parts[rank].mean(), "evaluation asks nobody"
        assert torch.equal(gathered(parts[rank])[0], parts[rank])
    every, start = gathered(parts[rank])
    assert torch.equal(every, both) and start == (0, 3)[rank]
    _beta_dpo_of_two_processes(rank)
    torch.distributed.destroy_process_group()


def _beta_dpo_of_two_processes(rank):
    """Batch after batch the same pairs, β and losses as one process has from all pairs."""
    objective, mean, std = build_loss("beta_dpo", filtered=0.5), 0.0, 0.0
    mine = slice(0, 5) if rank == 0 else slice(5, 8)
    for step in range(3):
        points = random_points(8, step)
        delta = points.delta
        part = Points(*(getattr(points, key)[mine] for key in ("p_w", "p_l", "q_w", "q_l", "n_w", "n_l")))
        mean, std = 0.9 * mean + 0.1 * delta.mean(), 0.9 * std + 0.1 * delta.std(ddof=1)
        kept = beta_kept(delta, mean, std, 0.5, 0, step)
        beta = max(1e-3, 0.1 * (1 + 0.6 * (delta[kept].mean() - mean)))
        truth = np.where(np.isin(np.arange(8), kept), -2 * logsig(beta * delta), 0)[mine]
        np.testing.assert_allclose(objective(as_pairs(part)).detach().numpy(), truth, rtol=1e-10)


def test_statistics_are_of_all_processes(tmp_path):
    ranks = [Forked(tmp_path, _process, rank, tmp_path) for rank in range(2)]
    assert exit_codes(ranks, 120) == [0, 0], "\n".join(rank.written[1] for rank in ranks)
