"""`ref_logps` of tokens: summed in the call, with the reference's token weights."""

import pytest
import torch

from spo_kernels import fused_spo_loss, linear_logprob
from spo_kernels.testing import random_batch


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("weights", [(False, False), (True, False), (True, True)], ids=["", "both", "apart"])
def test_reference_by_token_is_the_reference_itself(packed, weights):
    """Summed here, with the weights of the reference, as the log-probabilities of its hidden states are."""
    policy, reference = (random_batch((6, 8), 20, 5, ignored=0.3, dtype=torch.float64, seed=s) for s in (0, 1))
    labels, cu_seqlens, hiddens = policy.labels, None, [policy.hidden, reference.hidden]
    if packed:
        labels, cu_seqlens = labels.flatten(), torch.arange(7) * 8
        hiddens = [hidden.flatten(0, 1) for hidden in hiddens]
    logp = linear_logprob(hiddens[1], reference.weight, labels)
    torch.manual_seed(0)
    chosen = [torch.rand(labels.shape) if wanted else None for wanted in weights]
    options = {"token_weights": chosen[0], "ref_token_weights": chosen[1], "cu_seqlens": cu_seqlens, "loss": "dpo"}
    found = []
    for given in ({"ref_logps": logp}, {"ref_hidden": hiddens[1], "ref_head": reference.weight}):
        hidden = hiddens[0].clone().requires_grad_()
        loss, _ = fused_spo_loss(hidden, policy.weight, labels, **options, **given)
        loss.backward()
        found.append((loss.detach(), hidden.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_as_many_tokens_as_sequences_are_sums():
    """Packed, one of two sequences with both tokens: the values are not taken for those tokens'."""
    hidden, weight, labels = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([1, 2])
    _, metrics = fused_spo_loss(
        hidden, weight, labels, loss="dpo", ref_logps=torch.tensor([-1.0, -2.0]), cu_seqlens=torch.tensor([0, 2, 2])
    )
    logp = linear_logprob(hidden, weight, labels).sum()
    torch.testing.assert_close(metrics["rewards/chosen"], 0.1 * (logp + 1.0))
    torch.testing.assert_close(metrics["rewards/rejected"], torch.tensor(0.1 * 2.0))
