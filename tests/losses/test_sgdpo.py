"""SGDPO's pilots as `fused_spo_loss` finds them, against those that are made of token log-probabilities."""

import pytest
import torch

from spo_kernels import fused_spo_loss, linear_logprob
from spo_kernels.extras.token_weights import pilot_subsets, pilots
from spo_kernels.losses import SGDPO, SPO
from spo_kernels.testing import random_batch

PATHS = ("two_pass", "packed")


@pytest.fixture
def given():
    policy = random_batch((6, 9), 40, 8, ignored=0.3, dtype=torch.float64, seed=0)
    reference = random_batch((6, 9), 40, 8, dtype=torch.float64, seed=1)
    return policy.hidden, policy.weight, policy.labels, reference.hidden, reference.weight


def by_hand(objective, hidden, weight, labels, ref_hidden, ref_weight, shares=(0.6, 0.9)):
    torch.manual_seed(5)
    subsets = pilot_subsets(labels, r1=shares[0], r2=shares[1], shift=True)
    logp, ref_logp = (linear_logprob(h, w, labels, shift=True) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    found = pilots(logp, ref_logp, subsets)
    return fused_spo_loss(
        hidden, weight, labels, loss=objective, ref_logps=ref_logp.sum(-1), pair_inputs=found, shift=True
    )


@pytest.mark.parametrize("wrap", [lambda loss: loss, SPO], ids=["alone", "in SPO"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("workspace", [None, 30_000])
def test_pilots_of_both_models(given, path, workspace, wrap):
    hidden, weight, labels, ref_hidden, ref_weight = given
    objective, gradients = wrap(SGDPO(beta=0.5)), []
    ref_logps = linear_logprob(ref_hidden, ref_weight, labels, shift=True)
    # what lies where no label counts is not looked at
    of_tokens = ref_logps.masked_fill(labels == -100, torch.nan)
    of_tokens[:, 0] = torch.nan
    for given_as in ({"ref_hidden": ref_hidden, "ref_head": ref_weight}, {"ref_logps": of_tokens}, None):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        if given_as is None:
            loss, _ = by_hand(objective, *leaves, labels, ref_hidden, ref_weight)
        else:
            torch.manual_seed(5)
            loss, _ = fused_spo_loss(
                *leaves, labels, loss=objective, shift=True, path=path, workspace_bytes=workspace, **given_as
            )
        loss.backward()
        gradients.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for ours in gradients[:2]:
        for value, expected in zip(ours, gradients[2], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_every_call_draws_anew_and_the_same_for_a_seed(given):
    hidden, weight, labels, ref_hidden, ref_weight = given

    def loss():
        return fused_spo_loss(hidden, weight, labels, loss="sgdpo", ref_hidden=ref_hidden, ref_head=ref_weight)[0]

    torch.manual_seed(0)
    first, second = loss(), loss()
    torch.manual_seed(0)
    assert first == loss() != second


def test_a_reference_given_as_sums_is_not_enough(given):
    hidden, weight, labels, *_ = given
    with pytest.raises(ValueError, match=r"pass ref_hidden and ref_head, ref_logps of tokens in labels' shape, or"):
        fused_spo_loss(hidden, weight, labels, loss="sgdpo", ref_logps=torch.zeros(6))
    with pytest.raises(ValueError, match=r"path = 'factorised' cannot be taken"):
        fused_spo_loss(
            hidden, weight.requires_grad_(), labels, loss="sgdpo", ref_hidden=hidden, ref_head=weight.detach(),
            path="factorised",
        )  # fmt: skip
