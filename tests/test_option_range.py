"""Options at and beyond the edge of what they can be, and float64 weights wherever weights are taken."""

from functools import partial

import pytest
import torch

from spo_kernels import LMHead, fused_spo_loss, linear_kl, linear_logprob, sequence_logps
from spo_kernels.losses import DPO, SimPO

_generator = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(4, 3, 8, generator=_generator), torch.randn(19, 8, generator=_generator)
LABELS = torch.randint(19, (4, 3), generator=_generator)
CALLS = {
    "linear_logprob": partial(linear_logprob, HIDDEN, WEIGHT, LABELS),
    "sequence_logps": partial(sequence_logps, HIDDEN, WEIGHT, LABELS),
    "linear_kl": partial(linear_kl, HIDDEN, WEIGHT, HIDDEN, WEIGHT, LABELS),
    "fused_spo_loss": partial(fused_spo_loss, HIDDEN, WEIGHT, LABELS, loss="simpo"),
}


@pytest.mark.parametrize("workspace_bytes", [2**63, 2**80, 0, -1])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_workspace_must_fit_64_bits(call, workspace_bytes):
    with pytest.raises(ValueError, match=rf"workspace_bytes .*{workspace_bytes}"):
        call(workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_largest_workspace_is_taken(call):
    found, expected = call(workspace_bytes=2**63 - 1), call()
    if isinstance(found, tuple):
        found, expected = found[0], expected[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("softcap", [1e-44, 1e-39, 0.0, -1.0, float("nan"), float("inf")])
def test_a_softcap_that_float32_cannot_divide_by_is_refused(softcap):
    """Below the smallest normal float32, 1 / softcap is infinite and 0 * inf no number."""
    with pytest.raises(ValueError, match=r"logit_softcap .*got"):
        linear_logprob(HIDDEN, LMHead(WEIGHT, logit_softcap=softcap), LABELS)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match=r"logit_scale .*got"):
        linear_logprob(HIDDEN, LMHead(WEIGHT, logit_scale=scale), LABELS)


@pytest.mark.parametrize("softcap", [1e-30, 1e30])
def test_an_extreme_softcap_within_range_gives_numbers(backend, softcap):
    hidden = HIDDEN.clone().requires_grad_()
    logp = linear_logprob(hidden, LMHead(WEIGHT, logit_softcap=softcap), LABELS, backend=backend)
    logp.sum().backward()
    logits = HIDDEN.double() @ WEIGHT.double().t()
    expected = (softcap * torch.tanh(logits / softcap)).log_softmax(-1).gather(-1, LABELS[..., None])[..., 0]
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)
    assert hidden.grad.isfinite().all()


WAYS = {
    "two_pass": dict(path="two_pass"),
    "packed": dict(path="packed"),
    "factorised": dict(path="factorised"),
    "certified": dict(sparsity="certified"),
    "default": {},
}


@pytest.mark.parametrize("loss", [DPO(), SimPO()], ids=["margin", "no-reference"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["padded", "packed rows"])
def test_float64_token_weights(backend, layout, way, trained, loss):
    """The same as float32 weights of the same values, to rounding."""
    if not trained and "path" in WAYS[way] and way != "two_pass":
        pytest.skip("three products are for a trained head")
    weights = (torch.arange(12) % 4).view(4, 3) / 4
    hidden, labels, options = HIDDEN, LABELS, {}
    if layout != "padded":
        hidden, labels, weights = hidden.flatten(0, 1), labels.flatten(), weights.flatten()
        options = dict(cu_seqlens=torch.arange(5) * 3)
    if isinstance(loss, DPO):
        options |= dict(ref_logps=torch.arange(4.0) - 9)

    def run(given):
        leaves = hidden.clone().requires_grad_(), WEIGHT.clone().requires_grad_(trained)
        value, _ = fused_spo_loss(
            *leaves, labels, loss=loss, token_weights=given, backend=backend, **options, **WAYS[way]
        )
        value.backward()
        return value.detach(), leaves[0].grad, *([leaves[1].grad] if trained else [])

    for found, expected in zip(run(weights.double()), run(weights.float()), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)
