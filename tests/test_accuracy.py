"""The accuracy contract: a peaked distribution, 512-token sequences, float64 from the same inputs as the judge.

Token log-probabilities, sequence sums, margins, dH and dW stay within 4x of the error that float32 logits give,
and the worst sequence sum within 0.01 nat, from bfloat16 inputs too.
"""

import functools

import pytest
import torch

from spo_kernels import linear_logprob, sequence_logps
from spo_kernels.testing import Batch, eager_logprob, evaluate, peaked_batch

SEQUENCES, TOKENS, HIDDEN, VOCAB = 4, 512, 256, 4096
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@functools.cache
def batch_of(dtype):
    return peaked_batch(SEQUENCES, TOKENS, VOCAB, HIDDEN, dtype=dtype, spread=4.0)


def upstream():
    """What a preference loss sends back: one coefficient a sequence, opposite for chosen and rejected."""
    return {"logp": torch.tensor([-0.07, -0.02, 0.07, 0.02]).unsqueeze(1).expand(SEQUENCES, TOKENS)}


@functools.cache
def truth(dtype):
    return _with_sums(evaluate(eager_logprob, batch_of(dtype).to(torch.float64), upstream(), dtype=torch.float64))


@functools.cache
def float32_logits(dtype):
    return _with_sums(evaluate(eager_logprob, batch_of(dtype), upstream(), dtype=torch.float32))


def _with_sums(values):
    sums = values["logp"].sum(-1)
    chosen, rejected = sums.chunk(2)
    return values | {"sums": sums, "margins": chosen - rejected}


def worst(values, expected, name):
    return (values[name].double() - expected[name]).abs().max().item()


def root_mean_square(values, expected, name):
    return (values[name].double() - expected[name]).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
def test_contract(backend, dtype, trained):
    expected, eager = truth(dtype), float32_logits(dtype)
    ours = _with_sums(evaluate(linear_logprob, batch_of(dtype), upstream(), trained=trained, backend=backend))

    assert worst(ours, expected, "sums") < 0.01
    for name in ("logp", *(f"{leaf}.grad" for leaf in trained)):
        for measure in (worst, root_mean_square):
            found, allowed = measure(ours, expected, name), 4 * measure(eager, expected, name)
            assert found <= allowed, f"{measure.__name__} error of {name}: {found:.3g} > {allowed:.3g}"
    # Four sums and two margins are few: one that is right by luck must not set the bar below a float32's spacing.
    spacing = expected["sums"].abs().max().item() * torch.finfo(torch.float32).eps
    allowed = 4 * max(worst(eager, expected, "sums"), worst(eager, expected, "margins"), spacing)
    for name in ("sums", "margins"):
        found = worst(ours, expected, name)
        assert found <= allowed, f"error of {name}: {found:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequence_sums(backend, dtype):
    batch = batch_of(dtype)
    with torch.no_grad():
        sums = sequence_logps(batch.hidden, batch.weight, batch.labels, backend=backend)
    assert sums.dtype == torch.float32
    assert (sums - truth(dtype)["sums"]).abs().max() < 0.01


def test_bfloat16_logits_would_fail():
    """The bar means something: logits rounded to bfloat16 miss it by far."""
    batch = batch_of(torch.bfloat16)
    with torch.no_grad():
        logits = (batch.hidden @ batch.weight.T).float()
        logp = logits.log_softmax(-1).gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)
    assert (logp.sum(-1) - truth(torch.bfloat16)["sums"]).abs().max() > 0.1


def test_the_distribution_is_peaked():
    batch = batch_of(torch.float32)
    logits = batch.hidden[0] @ batch.weight.T
    assert 3.5 < logits.std() < 4.5
    assert logits.softmax(-1).max(-1).values.mean() > 0.1


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
@pytest.mark.parametrize(("top", "gap"), [(30.0, 13.0), (1000.0, 10.0), (10000.0, 9.0)], ids=str)
def test_near_certain_tokens(backend, top, gap, trained):
    """Large logits, a log-probability near 0: off by roundings of the sum, which is near 1, not of a logit."""
    weight = torch.tensor([[top]] + [[top - gap]] * 20)
    batch = Batch(torch.ones(1, 1), weight, torch.zeros(1, dtype=torch.int64))
    exact = evaluate(linear_logprob, batch.to(torch.float64), {"logp": torch.ones(1).double()}, trained=trained)
    found = evaluate(linear_logprob, batch, {"logp": torch.ones(1)}, trained=trained, backend=backend)
    roundings = 8 * torch.finfo(torch.float32).eps
    assert worst(found, exact, "logp") <= roundings
    for name in trained:
        # hidden's gradient is a difference of numbers near `top`
        scale = top if name == "hidden" else 1.0
        assert worst(found, exact, f"{name}.grad") <= roundings * scale
