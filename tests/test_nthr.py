"""NTHR's scores and multipliers against explicit [N, V] residuals in float64, and without any such tensor."""

import pytest
import torch
import torch.nn.functional as F

from spo_kernels import LMHead, linear_logprob
from spo_kernels.extras.nthr import nthr_multipliers, nthr_scores
from spo_kernels.testing import TensorMeter, peaked_batch, random_batch

GROUP, TOKENS, VOCAB, HIDDEN = 5, 7, 31, 9
CORRECT = torch.tensor([True, False, True, False, False])


def make_batch(dtype=torch.float64):
    batch = peaked_batch(GROUP, TOKENS, VOCAB, HIDDEN, dtype=dtype, spread=2.0)
    batch.labels[:, :2] = -100
    batch.labels[2, 5:] = -100
    for wrong, right in (((3, 2), (0, 3)), ((1, 4), (2, 4)), ((4, 5), (2, 2))):  # tokens that both kinds share
        batch.labels[wrong] = batch.labels[right]
        batch.hidden[wrong] = 1.5 * batch.hidden[right]
    bias = torch.linspace(-1, 1, VOCAB, dtype=torch.float64).to(dtype)
    return {"hidden": batch.hidden, "head": LMHead(batch.weight, bias), "labels": batch.labels}


def transformed(batch, **transform):
    return batch | {"head": LMHead(batch["head"].weight, batch["head"].bias, **transform)}


def eager_scores(batch, correct, *, shift=False):
    """The formula, token by token pair, from full logits; g with the slope of the logits, as a gradient has it."""
    head, labels = batch["head"], batch["labels"]
    hidden, weight, bias = batch["hidden"].double(), head.weight.double(), head.bias.double()
    keep = labels != -100
    if shift:
        hidden, keep = hidden.roll(1, 1), keep & (torch.arange(labels.shape[1]) > 0)
    products = (hidden @ weight.T + bias).requires_grad_()
    logits, cap = head.logit_scale * products, head.logit_softcap
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    (slope,) = torch.autograd.grad(logits.sum(), products)
    g = (F.one_hot(labels.clamp_min(0), weight.shape[0]) - logits.softmax(-1)) * slope
    g = g.detach()[..., labels[keep].unique()]
    own = torch.arange(labels.shape[0])[:, None].expand(labels.shape)[keep]
    residuals, states = g[keep], hidden[keep]
    inner = (residuals @ residuals.T) * (states @ states.T)
    scores = torch.zeros(labels.shape, dtype=torch.float64)
    scores[keep] = inner[correct[own]].sum(0)
    return scores


OPTIONS = {
    "plain": ({}, False),
    "shift": ({}, True),
    "scale": ({"logit_scale": 0.7}, False),
    "softcap": ({"logit_scale": 2.0, "logit_softcap": 3.0}, False),
}


@pytest.mark.parametrize(("transform", "shift"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("workspace_bytes", [None, 1 << 10], ids=["one-tile", "many-tiles"])
def test_scores(transform, shift, workspace_bytes):
    batch = transformed(make_batch(), **transform)
    scores = nthr_scores(**batch, correct=CORRECT, workspace_bytes=workspace_bytes, backend="torch", shift=shift)
    truth = eager_scores(batch, CORRECT, shift=shift)
    assert scores.dtype == torch.float64 and not scores.requires_grad
    torch.testing.assert_close(scores, truth, rtol=1e-11, atol=1e-12)
    assert truth.abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs(backend, dtype):
    batch = make_batch(dtype)
    scores, truth = nthr_scores(**batch, correct=CORRECT, backend=backend), eager_scores(batch, CORRECT)
    assert scores.dtype == torch.float32
    assert (scores - truth).abs().max() <= 32 * torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("shift", [False, True])
def test_packed(shift):
    batch = make_batch()
    padded = nthr_scores(**batch, correct=CORRECT, shift=shift)
    bounds = torch.arange(GROUP + 1) * TOKENS
    flat = batch | {"hidden": batch["hidden"].flatten(0, 1), "labels": batch["labels"].flatten()}
    packed = nthr_scores(**flat, correct=CORRECT, cu_seqlens=bounds, shift=shift)
    torch.testing.assert_close(packed, padded.flatten())
    multipliers = nthr_multipliers(**flat, correct=CORRECT, cu_seqlens=bounds, shift=shift)
    torch.testing.assert_close(multipliers, nthr_multipliers(**batch, correct=CORRECT, shift=shift).flatten())


def test_lse_at_hand():
    batch = make_batch()
    _, extras = linear_logprob(**batch, outputs=("lse",))
    given = nthr_scores(**batch, correct=CORRECT, lse=extras["lse"])
    torch.testing.assert_close(given, nthr_scores(**batch, correct=CORRECT))


@pytest.mark.parametrize(("beta", "eta"), [(1.0, None), (1.0, 0.0), (0.3, 0.25)])
def test_multipliers(beta, eta):
    batch = make_batch()
    truth, keep = eager_scores(batch, CORRECT), batch["labels"] != -100
    means = [truth[i][keep[i]].mean() for i in range(GROUP) if CORRECT[i]]
    threshold = beta * min(means)
    expected = torch.ones(GROUP, TOKENS, dtype=torch.float64)
    for row in (1, 3, 4):
        expected[row][keep[row] & (truth[row] > threshold)] = 2 * abs(0.5 - 2 / 5) if eta is None else eta
    found = nthr_multipliers(**batch, correct=CORRECT, beta=beta, eta=eta)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert 0 < (expected != 1).sum() < keep[~CORRECT].sum()


@pytest.mark.parametrize("correct", [[True] * GROUP, [False] * GROUP])
def test_nothing_to_compare_with(correct):
    batch = make_batch()
    assert (nthr_multipliers(**batch, correct=torch.tensor(correct)) == 1).all()


def test_empty_responses():
    batch = make_batch()
    batch["labels"][[0, 1]] = -100
    found = nthr_multipliers(**batch, correct=CORRECT)
    truth = eager_scores(batch, CORRECT)
    threshold = truth[2][batch["labels"][2] != -100].mean()  # response 0 has no mean
    assert (found != 1).any() and ((truth[3:] > threshold) & (batch["labels"][3:] != -100)).equal(found[3:] != 1)
    batch["labels"].fill_(-100)
    assert not nthr_scores(**batch, correct=CORRECT).any()
    assert (nthr_multipliers(**batch, correct=CORRECT) == 1).all()


def test_no_logits(backend):
    group, tokens, vocab, hidden = 4, 128, 4096, 16
    batch = random_batch((group, tokens), vocab, hidden)
    batch.labels.remainder_(100)  # 100 classes occur
    correct = torch.tensor([True, False, True, False])
    with TensorMeter() as meter:
        nthr_multipliers(batch.hidden, batch.weight, batch.labels, correct, workspace_bytes=256 << 10, backend=backend)
    assert meter.peak < group * tokens * vocab * 4 / 8
    assert meter.peak < (256 << 10) + 40 * group * tokens * 8


LABELS = torch.zeros(GROUP, TOKENS, dtype=torch.int64)
WRONG = {
    "correct-list": ({"correct": [True]}, TypeError, "correct must be a torch.Tensor, got list"),
    "correct-dtype": ({"correct": CORRECT.long()}, ValueError, "correct must be bool, .*got torch.int64"),
    "correct-shape": ({"correct": CORRECT[:3]}, ValueError, r"each of the 5 responses, on cpu; got torch.bool \[3\]"),
    "hidden-2d": (
        {"hidden": torch.zeros(3, HIDDEN)},
        ValueError,
        r"labels must have hidden's leading shape \[3\], got \[5, 7\]",
    ),
    "labels-3d": ({"labels": LABELS[None]}, ValueError, r"labels must be \[G, T\], or \[N\] with cu_seqlens; got"),
    "lse-shape": ({"lse": torch.zeros(3)}, ValueError, r"lse must have labels' shape \[5, 7\] on cpu, got \[3\]"),
    "lse-list": ({"lse": [0.0]}, TypeError, "lse must be a torch.Tensor"),
    "label": ({"labels": LABELS + VOCAB}, IndexError, r"labels\[0, 0\] = 31 is outside \[0, 31\)"),
    "head": ({"head": torch.zeros(VOCAB, 3)}, ValueError, "head must have shape"),
    "beta": ({"beta": -1.0}, ValueError, "beta must be a number >= 0, got -1.0"),
    "eta": ({"eta": float("nan")}, ValueError, "eta must be a number >= 0, got nan"),
    "option": ({"workspace_bytes": -1}, ValueError, "workspace_bytes must be positive"),
    "option-of-earlier-versions": ({"logit_softcap": 3.0}, TypeError, "takes no logit_softcap=: pass head=LMHead"),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        nthr_multipliers(**(make_batch() | {"correct": CORRECT} | changes))
