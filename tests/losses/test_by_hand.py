"""Numbers that stand here, so that a changed sign, factor or detach cannot go unseen; and what the methods are for."""

import dataclasses

import pytest
import torch

from spo_kernels.extras.nthr import nthr_multipliers, nthr_scores
from spo_kernels.extras.token_weights import pilot_subsets, pilots, sampo_weights
from spo_kernels.extras.uncertainty import EmbeddingUncertainty
from spo_kernels.losses import (
    DPO,
    KTO,
    RDPO,
    SGDPO,
    BetaDPO,
    ChiPO,
    DPOShiftLinear,
    PairLogps,
    build_loss,
    odpo_offsets,
)

from .by_hand import BETA_DPO_BATCHES, INPUTS, PAIRS, ROWS
from .points import differentiate


def pairs_of(rows, inputs=None):
    """Rows `p_w, p_l, q_w, q_l, n_w, n_l` as an objective sees them, in float64."""
    columns = list(zip(*rows, strict=True))
    logps = [torch.tensor(column, dtype=torch.float64) for column in columns[:4]]
    named = {name: torch.tensor(values, dtype=torch.float64) for name, values in (inputs or {}).items()}
    lengths = [torch.tensor(column) for column in columns[4:]]
    return PairLogps(logps[0].requires_grad_(), logps[1].requires_grad_(), *logps[2:], *lengths, inputs=named)


def check(found, wanted):
    for name, value, numbers in zip(("loss", "g_w", "g_l"), found, wanted, strict=True):
        numbers = torch.tensor(numbers, dtype=torch.float64)
        torch.testing.assert_close(
            value, numbers, rtol=1e-12, atol=1e-15, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("name", "hyperparameters", "wanted"),
    [(name, given, numbers) for name, given, *numbers in ROWS],
    ids=[f"{name}-{number}" for number, (name, *_) in enumerate(ROWS)],
)
def test_numbers(name, hyperparameters, wanted):
    check(differentiate(build_loss(name, **hyperparameters), pairs_of(PAIRS, INPUTS)), wanted)


def test_beta_dpo_from_batch_to_batch():
    """The running mean and spread go on, and each batch has a draw of its own."""
    objective = BetaDPO()
    objective(pairs_of(PAIRS))
    for order, losses, g_w in BETA_DPO_BATCHES:
        found = differentiate(objective, pairs_of([PAIRS[i] for i in order]))
        check(found, (losses, g_w, [-g for g in g_w]))
    state = {name: value.item() for name, value in objective.state_dict().items()}
    assert state == pytest.approx({"mean": -0.487125, "std": 0.5545169169568067, "batches": 3.0}, rel=1e-12)


def test_dpo_shift_from_batch_to_batch():
    """λ of 0.5, 0.75, 1, 1: at the ends -log σ(0.01 (1.5 + 0.5)) and DPO's -log σ(0.01 · 2.5)."""
    objective = DPOShiftLinear(first=0.5, last=1.0, batches=2.0)
    losses = [objective(pairs_of(PAIRS[:1])).item() for _ in range(4)]
    wanted = [0.6831971797266342, 0.6819604604751515, 0.6807253035255248, 0.6807253035255248]
    assert losses == pytest.approx(wanted, rel=1e-12)


def test_odpo_offsets():
    chosen, rejected = (torch.tensor(values, dtype=torch.float64) for values in ([3.0, 0.5], [1.0, 0.25]))
    assert odpo_offsets(chosen, rejected).tolist() == pytest.approx([0.6931471805599453, -1.3862943611198906])
    ratios = odpo_offsets(chosen, rejected, "log_ratio")
    assert ratios.tolist() == pytest.approx([1.0986122886681098, 0.6931471805599453])
    for arguments, message in (
        ((rejected, chosen), r"above rejected_scores.*got chosen_scores\[0\] = 1.0 and rejected_scores\[0\] = 3.0"),
        ((chosen, -rejected, "log_ratio"), r"above 0 for form = 'log_ratio', got chosen_scores\[0\] = 3.0"),
        ((chosen, rejected[:1]), r"must both be \[B\], got \[2\] and \[1\]"),
        ((chosen, rejected, "difference"), "form must be one of 'log_difference', 'log_ratio'"),
    ):
        with pytest.raises(ValueError, match=message):
            odpo_offsets(*arguments)


def test_a_batch_of_empty_responses_divides_by_one():
    rows = [(0.0, 0.0, 0.0, 0.0, 0, 0)] * 2
    for normalization in ("tokens", "mean"):
        assert build_loss("sft", normalization=normalization)(pairs_of(rows)).tolist() == [0, 0]


# ---- below and beside the pair


def test_sampo_takes_as_many_tokens_of_each():
    """Responses of 4 and 2 tokens, and of 1 and 3: two of either, then one of either."""
    labels = torch.full((4, 5), -100)
    for row, length in enumerate((4, 1, 2, 3)):
        labels[row, 1 : 1 + length] = 7
    weights = sampo_weights(labels, generator=torch.Generator().manual_seed(0))
    assert weights.sum(-1).tolist() == [2, 1, 2, 1]
    assert set(weights.unique().tolist()) == {0.0, 1.0} and not weights[labels == -100].any()
    assert weights[2, 1:3].tolist() == [1, 1] and weights[1, 1] == 1, "all of the shorter response"


def test_pilots_take_shares_of_the_shorter_length():
    """Of 10 and 6 tokens: 0.6 · 6 and 0.9 · 6 rounded down; of 1 and 8: one each at least."""
    labels = torch.full((4, 10), -100)
    for row, length in enumerate((10, 1, 6, 8)):
        labels[row, :length] = 7
    subsets = pilot_subsets(labels, generator=torch.Generator().manual_seed(0))
    assert subsets.sum(-1).tolist() == [3, 1, 5, 1]
    halves = pilot_subsets(labels, r1=1.0, r2=0.5, generator=torch.Generator().manual_seed(0))
    assert halves.sum(-1).tolist() == [6, 1, 3, 1]


def test_pilots_by_hand():
    """Sums of log πθ - log πref over the drawn tokens, a constant; packed, responses of 2, 1, 1 and 3 tokens."""
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0], requires_grad=True)
    ref_logp = torch.tensor([-0.5, -1.0, -4.0, -4.5, -7.0, -6.0, -6.0], requires_grad=True)
    subsets, bounds = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 2, 3, 4, 7])
    found = pilots(logp, ref_logp, subsets, cu_seqlens=bounds)
    assert {name: value.tolist() for name, value in found.items()} == {
        "chosen_pilot": [-0.5, 1.0],
        "rejected_pilot": [0.5, 1.0],
    }
    assert not any(value.requires_grad for value in found.values())
    drawn = pilot_subsets(torch.zeros(7, dtype=torch.int64), r1=0.5, r2=1.0, cu_seqlens=bounds)
    assert torch.segment_reduce(drawn, "sum", lengths=bounds.diff()).tolist() == [1, 1, 1, 1]


def test_nthr_by_hand():
    """Two correct responses and a wrong one, a head of zeros: both classes have probability ½.

    g is (½, -½) for label 0 and its opposite for label 1, so <g, g'> is ½ or -½, and a score is the sum over correct
    tokens of that times <h, h'>. The correct tokens' h are (1, 0), (0, 1) and (4, 0), all of label 0: a token of that
    label has ½ <(5, 1), h>. τ is the smallest mean of a correct response, of 2.5 and ½ or of 10: 1.5. Of the wrong
    response's 2, 1 and, by its label, -5 the first is above, and counts η = 2 |½ - ⅔| times.
    """
    none = [0.0, 0.0]
    hidden = [[[1, 0], [0, 1], none], [[4, 0], none, none], [[0.8, 0], [0.4, 0], [2, 0]]]
    hidden = torch.tensor(hidden, dtype=torch.float64)
    labels = torch.tensor([[0, 0, -100], [0, -100, -100], [0, 0, 1]])
    correct, weight = torch.tensor([True, True, False]), torch.zeros(2, 2, dtype=torch.float64)
    scores = torch.tensor([[2.5, 0.5, 0], [10, 0, 0], [2, 1, -5]], dtype=torch.float64)
    torch.testing.assert_close(nthr_scores(hidden, weight, labels, correct), scores)
    for given, wanted in (
        ({}, [1 / 3, 1, 1]),
        ({"eta": 0.25}, [0.25, 1, 1]),
        ({"eta": 0.25, "beta": 1.5}, [1, 1, 1]),
        ({"eta": 0.25, "beta": 0.5}, [0.25, 0.25, 1]),
    ):
        found = nthr_multipliers(hidden, weight, labels, correct, **given)
        assert found[2].tolist() == pytest.approx(wanted) and (found[:2] == 1).all(), given


def test_adv_po_by_hand():
    """M = diag(1, 1) + (2, 0)(2, 0)ᵀ + (0, 1)(0, 1)ᵀ = diag(5, 2)."""
    uncertainty = EmbeddingUncertainty(2)
    uncertainty.update(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    # (5, 0): sqrt(25 / 5); (1, 2): sqrt(1/5 + 4/2)
    found = uncertainty(torch.tensor([[5.0, 0.0], [1.0, 2.0]]))
    assert found.tolist() == pytest.approx([2.23606797749979, 1.4832396974191326], rel=1e-6)
    # g = (5, 4) - (0, 0): gᵀ M⁻¹ g = 5 + 8 = 13, λ* = sqrt(13 / 4), M⁻¹ g = (1, 2)
    head, current, reference = torch.tensor([3.0, 1.0]), torch.tensor([[6.0, 8.0], [6.0, 2.0]]), torch.ones(3, 2)
    worst = uncertainty.pessimistic_head(head, current, reference, bound=4.0)
    assert worst.tolist() == pytest.approx([3 - 0.5547001962252291, 1 - 1.1094003924504583], rel=1e-12)


# ---- what the methods are for


def test_r_dpo_weighs_a_pair_with_the_shorter_chosen_response_more():
    rows = [(-12.0, -15.0, -13.5, -14.0, n_w, n_l) for n_w, n_l in ((5, 20), (10, 10), (20, 5))]
    _, g_w, g_l = differentiate(RDPO(), pairs_of(rows))
    plain = differentiate(DPO(), pairs_of(rows))[1]
    assert g_w[0] < g_w[1] < g_w[2] < 0 and torch.equal(g_w, -g_l)
    assert g_w[1] == plain[1], "lengths that are equal change nothing"
    assert g_w[0] < plain[0] and g_w[2] > plain[2]


def test_beta_dpos_beta_grows_with_the_batchs_margin():
    """β_b is the slope at a pair whose margin is 0; the batches differ in the others' margins only."""
    betas = []
    for margin in (-4.0, -1.0, 0.0, 1.0, 4.0):
        rows = [(-5.0, -5.0, -5.0, -5.0, 3, 3)] + [(-5.0 + margin, -5.0, -5.0, -5.0, 3, 3)] * 9
        objective = BetaDPO(filtered=0.0)
        betas.append(-2 * differentiate(objective, pairs_of(rows))[1][0].item())
    assert betas == sorted(betas) and betas[2] == pytest.approx(0.1) and betas[0] < 0.1 < betas[4]
    # from M = 0: 0.1 (1 + 0.6 · 0.9 · 0.9 · margin)
    assert betas == pytest.approx([max(1e-3, 0.1 + 0.0486 * margin) for margin in (-4, -1, 0, 1, 4)])


def test_beta_dpo_leaves_outliers_out():
    """Nine pairs at the usual margin and one far from it: over 50 draws that one goes first, nearly always."""
    rows = [(-5.0 + 0.01 * i, -6.0, -5.0, -5.0, 3, 3) for i in range(9)] + [(-1.0, -60.0, -5.0, -5.0, 3, 3)]
    objective, losses = BetaDPO(filtered=0.1, decay=0.0), []
    for _ in range(50):
        losses.append(objective(pairs_of(rows)).detach())
    dropped = torch.stack(losses) == 0
    assert (dropped.sum(1) == 1).all() and dropped[:, 9].double().mean() > 0.6
    # a single pair is never left out, and the mean over pairs is the mean over kept ones
    assert BetaDPO(filtered=0.9)(pairs_of(rows[:1])).item() > 0
    assert objective(pairs_of(rows)).count_nonzero() == 9


def test_beta_dpo_follows_its_seed():
    rows = [(-5.0 + 0.3 * i, -6.0, -5.0, -5.0, 3, 3) for i in range(20)]

    def kept(seed):
        objective = BetaDPO(filtered=0.5, decay=0.0, seed=seed)
        return [(objective(pairs_of(rows)) != 0).tolist() for _ in range(3)]

    draws = kept(3)
    assert draws == kept(3) != kept(4)
    assert draws[0] != draws[1] != draws[2] and all(sum(draw) == 10 for draw in draws)


def test_sgdpo_with_whole_responses_of_one_length_is_dpo_at_half_the_gradient():
    rows = [(*row[:4], 6, 6) for row in PAIRS]
    ratios = pairs_of(rows)
    inputs = {"chosen_pilot": [p[0] - p[2] for p in rows], "rejected_pilot": [p[1] - p[3] for p in rows]}
    loss, g_w, g_l = differentiate(SGDPO(r1=1.0, r2=1.0), pairs_of(rows, inputs))
    dpo, dpo_w, dpo_l = differentiate(DPO(), ratios)
    torch.testing.assert_close(loss, dpo, rtol=1e-14, atol=0)
    torch.testing.assert_close(g_w, dpo_w / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(g_l, dpo_l / 2, rtol=1e-14, atol=0)
    assert SGDPO().token_subsets == (0.6, 0.9)


@pytest.mark.parametrize("bound", [0.3, 10.0])
def test_chi_pos_logit_never_leaves_its_clip(bound):
    draw = torch.Generator().manual_seed(0)
    rows = (40 * torch.randn(500, 4, generator=draw, dtype=torch.float64)).tolist()
    pairs = pairs_of([(*row, 5, 5) for row in rows])
    logits = ChiPO(reward_bound=bound).logits(pairs)
    assert (logits.abs() <= 2 * bound).all() and logits.max() == 2 * bound and logits.min() == -2 * bound
    _, g_w, g_l = differentiate(ChiPO(reward_bound=bound), pairs)
    # e^-100 is clipped too: nothing is left of its gradient
    far = pairs_of([(-1.0, -101.0, -1.0, -1.0, 1, 1)])
    assert differentiate(ChiPO(reward_bound=bound, gamma=0.0), far)[2].item() == 0.0
    assert not g_w[logits.abs() == 2 * bound].any() and not g_l[logits.abs() == 2 * bound].any()


def test_ktos_z_carries_no_gradient_and_is_of_all_pairs():
    """Doubling one pair's log-ratio moves the other's loss, and no gradient says so."""
    rows = [list(PAIRS[0]), list(PAIRS[3])]
    before = differentiate(KTO(), pairs_of(rows))
    rows[1][0] += 3.0
    after = differentiate(KTO(), pairs_of(rows))
    assert before[0][0] != after[0][0]
    alone = pairs_of(rows[:1])
    alone = dataclasses.replace(alone, inputs={"kl": torch.tensor([1.375 + 0.75], dtype=torch.float64)})
    found = differentiate(KTO(kl="input"), alone)
    assert found[1][0] == pytest.approx(after[1][0].item(), rel=1e-12)
