"""Every tensor argument is checked once a call, and which labels count is derived once."""

from collections import Counter

import pytest
import torch

from spo_kernels import LMHead, fused_spo_loss, linear_kl, linear_logprob, sequence_logps
from spo_kernels.engine import checks, inputs, tokens
from spo_kernels.losses import ODPO, TDPO, WeightedSum
from spo_kernels.testing import random_batch


@pytest.fixture
def counted(monkeypatch):
    """How often each argument was checked, and each derivation run."""
    seen = Counter()
    check, mask, find = checks.check_tensor, tokens.LabelLayout.counted, tokens.find_tokens

    def check_tensor(name, *rest):
        seen[name] += 1
        return check(name, *rest)

    def counted_labels(layout):
        seen["derivation of counted labels"] += 1
        return mask(layout)

    def find_tokens(*arguments):
        seen["places of counted labels"] += 1
        return find(*arguments)

    for module in (checks, inputs):
        monkeypatch.setattr(module, "check_tensor", check_tensor)
    monkeypatch.setattr(tokens.LabelLayout, "counted", counted_labels)
    monkeypatch.setattr(tokens, "find_tokens", find_tokens)
    return seen


DERIVED = ("derivation of counted labels", "places of counted labels")


def model(seed, bias=True):
    found = random_batch((4, 6), 40, 8, bias=bias, ignored=0.3, seed=seed)
    return found.hidden, LMHead(found.weight.requires_grad_(), found.bias), found.labels


def test_a_loss_with_everything(counted):
    """ref_hidden, a KL objective, token weights, per-pair inputs and a bias on both sides."""
    (hidden, head, labels), (ref_hidden, ref_head, _) = model(0), model(1)
    fused_spo_loss(
        hidden,
        head,
        labels,
        loss=WeightedSum((TDPO(), ODPO()), (1.0, 1.0)),
        ref_hidden=ref_hidden,
        ref_head=ref_head,
        token_weights=torch.rand(labels.shape),
        ref_token_weights=torch.rand(labels.shape),
        pair_inputs={"offset": torch.ones(2)},
        shift=True,
        token_metrics=True,
    )
    names = ("hidden", "head.weight", "head.bias", "labels", "ref_hidden", "ref_head.weight", "ref_head.bias")
    names += ("token_weights", "ref_token_weights", "pair_inputs['offset']", *DERIVED)
    assert counted == Counter(names)


@pytest.mark.parametrize("path", ["two_pass", "packed", "factorised"])
def test_a_packed_loss_on_each_path(path, counted):
    hidden, head, labels = model(0)
    bounds = torch.tensor([0, 3, 9, 17, 24])
    fused_spo_loss(
        hidden.flatten(0, 1), head, labels.flatten(), loss="dpo", ref_logps=torch.zeros(4), cu_seqlens=bounds, path=path
    )
    assert counted == Counter(("hidden", "head.weight", "head.bias", "labels", "ref_logps", "cu_seqlens", *DERIVED))


def test_the_other_public_functions(counted):
    (hidden, head, labels), (ref_hidden, ref_head, _) = model(0), model(1, bias=False)
    linear_logprob(hidden, head.weight, labels)
    assert counted == Counter(("hidden", "head", "labels", *DERIVED))
    counted.clear()
    sequence_logps(hidden, head, labels, token_weights=torch.rand(labels.shape))
    assert counted == Counter(("hidden", "head.weight", "head.bias", "labels", "token_weights", *DERIVED))
    counted.clear()
    linear_kl(hidden, head, ref_hidden, ref_head, labels)
    names = ("hidden", "head.weight", "head.bias", "labels", "ref_hidden", "ref_head.weight")
    assert counted == Counter((*names, *DERIVED))


def test_a_reference_with_other_weights_of_zero_is_found_apart(counted):
    """Weights of zero take tokens out of the products, so two sets of weights are two sets of tokens."""
    (hidden, head, labels), (ref_hidden, ref_head, _) = model(0), model(1)
    weights = torch.ones(labels.shape)
    fused_spo_loss(
        hidden,
        head,
        labels,
        loss="dpo",
        ref_hidden=ref_hidden,
        ref_head=ref_head,
        token_weights=weights,
        ref_token_weights=weights.triu(),
    )
    assert counted["derivation of counted labels"] == 1
    assert counted["places of counted labels"] == 2
