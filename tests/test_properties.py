"""Randomised cases against the float64 oracle: outputs and every gradient, element by element.

Deterministic (see conftest.py): a failure repeats, and the printed example says which tensors to build.
"""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from least_workspace import least_workspace

from spo_kernels import fused_spo_loss, linear_logprob, sequence_logps
from spo_kernels.losses import DPO, SPO
from spo_kernels.testing import (
    Batch,
    Oracle,
    assert_accurate,
    check_linear_logprob,
    eager_logprob,
    evaluate,
    random_batch,
    random_upstream,
    worst_error,
)

OUTPUTS = ("lse", "entropy", "correct", "log_sum_p2")


@dataclasses.dataclass(frozen=True)
class Case:
    """What a randomised batch is made from; small enough to read in a failure."""

    shape: tuple[int, ...]
    vocab: int
    hidden_size: int
    dtype: torch.dtype
    bias: bool
    ignored: float
    spread: float
    upstream: float
    transposed: bool
    seed: int
    room: int | None  # workspace, in units of the least one
    options: dict

    def batch(self):
        batch = random_batch(
            self.shape,
            self.vocab,
            self.hidden_size,
            dtype=self.dtype,
            bias=self.bias,
            ignored=self.ignored,
            ignore_index=self.options.get("ignore_index", -100),
            spread=self.spread,
            seed=self.seed,
        )
        if self.transposed:
            batch = dataclasses.replace(batch, weight=batch.weight.T.contiguous().T)
        return batch

    def workspace_bytes(self, batch, backend):
        options = dict(self.options, backend=backend)
        return self.room and self.room * least_workspace(linear_logprob, batch, **options)


@st.composite
def cases(draw, dtypes, outputs=OUTPUTS):
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=0, max_size=3)))
    vocab = draw(st.integers(1, 70))
    options = {
        "outputs": tuple(draw(st.lists(st.sampled_from(outputs), unique=True))),
        "logit_scale": draw(st.sampled_from([1.0, 0.125, -0.7, 3.0])),
        "logit_softcap": draw(st.sampled_from([None, None, 2.5, 30.0])),
        "shift": bool(shape) and draw(st.booleans()),
        "ignore_index": draw(st.sampled_from([-100, -100, -1, vocab // 2])),
    }
    return Case(
        shape=shape,
        vocab=vocab,
        hidden_size=draw(st.integers(1, 40)),
        dtype=draw(st.sampled_from(dtypes)),
        bias=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        spread=draw(st.sampled_from([1.0, 1.0, 4.0, 30.0, 1e4])),
        upstream=draw(st.sampled_from([1.0, 1.0, 1e-4, 100.0])),
        transposed=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        room=draw(st.sampled_from([None, None, 2, 8])),
        options=options,
    )


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@given(case=cases(FLOATS))
@settings(max_examples=200)
def test_outputs_and_every_gradient(backend, case):
    batch = case.batch()
    upstream = random_upstream(batch, case.options["outputs"], size=case.upstream, seed=case.seed)
    check_linear_logprob(
        linear_logprob,
        batch,
        upstream=upstream,
        backend=backend,
        workspace_bytes=case.workspace_bytes(batch, backend),
        **case.options,
    )


@given(case=cases([torch.float64]))
@settings(max_examples=60)
def test_outputs_and_every_gradient_in_float64(case):
    batch = case.batch()
    upstream = random_upstream(batch, case.options["outputs"], size=case.upstream, seed=case.seed)
    check_linear_logprob(
        linear_logprob,
        batch,
        upstream=upstream,
        backend="torch",
        workspace_bytes=case.workspace_bytes(batch, "torch"),
        **case.options,
    )


TRAINED = st.sampled_from([("hidden",), ("weight",), ("hidden", "weight"), ("hidden", "bias")])


def test_what_the_dtype_cannot_hold_is_an_infinity():
    """70,000 is -inf or inf in float16 by rounding; 60,000, or the other sign, is an error."""
    large = torch.tensor([-70_000.0], dtype=torch.float64)
    assert worst_error(torch.tensor([-torch.inf], dtype=torch.float16), large) == 0
    assert worst_error(torch.tensor([-torch.inf]), large) == torch.inf
    assert worst_error(torch.tensor([torch.inf], dtype=torch.float16), large) == torch.inf
    assert worst_error(torch.tensor([-torch.inf], dtype=torch.float16), large + 10_000) == torch.inf


@given(case=cases(FLOATS, outputs=("correct",)), trained=TRAINED)
@settings(max_examples=80)
def test_partly_trained(backend, case, trained):
    """The frozen head finishes its gradient in the forward: a path of its own."""
    batch = dataclasses.replace(case, bias=True).batch()
    upstream = random_upstream(batch, size=case.upstream, seed=case.seed)
    actual = evaluate(
        linear_logprob,
        batch,
        upstream,
        trained=trained,
        backend=backend,
        workspace_bytes=case.workspace_bytes(batch, backend),
        **case.options,
    )
    oracle = Oracle(batch, upstream, **case.options)
    for name in {"hidden", "weight", "bias"} - set(trained):
        del oracle.values[f"{name}.grad"]
    assert_accurate(actual, oracle, evaluate(eager_logprob, batch, upstream, **case.options))


@st.composite
def ragged_pairs(draw):
    """Lengths of B chosen, then B rejected sequences; the sizes and the seed of the rest."""
    pairs = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, 9), min_size=2 * pairs, max_size=2 * pairs))
    return lengths, draw(st.integers(2, 50)), draw(st.integers(1, 24)), draw(st.integers(0, 2**16))


@given(
    pairs=ragged_pairs(),
    shift=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    ignored=st.sampled_from([0.0, 0.5]),
    objective=st.sampled_from([DPO(beta=0.5), SPO(DPO(beta=0.1)), SPO(DPO(beta=1.0), penalty="hinge")]),
)
@settings(max_examples=60)
def test_packed_equals_padded(backend, pairs, shift, dtype, ignored, objective):
    """The same sequences end to end, or one a row with ignored padding: one loss, one gradient."""
    lengths, vocab, hidden_size, seed = pairs
    rows = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    padded = random_batch(rows.shape, vocab, hidden_size, dtype=dtype, ignored=ignored, seed=seed)
    padded.labels[~rows] = -100
    packed = Batch(padded.hidden[rows], padded.weight, padded.labels[rows])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    reference = torch.randn(len(lengths), generator=torch.Generator().manual_seed(seed)) - 5

    def run(batch, **layout):
        weight, hidden = batch.weight.clone().requires_grad_(), batch.hidden.clone().requires_grad_()
        options = dict(shift=shift, backend=backend, **layout)
        sums = sequence_logps(hidden, weight, batch.labels, **options)
        loss, metrics = fused_spo_loss(hidden, weight, batch.labels, loss=objective, ref_logps=reference, **options)
        loss.backward()
        return sums.detach(), loss.detach(), metrics["rewards/margins"], hidden.grad, weight.grad

    of_padded, of_packed = run(padded), run(packed, cu_seqlens=cu_seqlens)
    assert not of_padded[3][~rows].any()
    of_padded = (*of_padded[:3], of_padded[3][rows], of_padded[4])
    # A sum's own rounding goes through the margin into everything else.
    rounding = 1 + of_padded[0].abs().max().item()
    for ours, theirs in zip(of_packed, of_padded, strict=True):
        scale = 1 + (theirs.abs().max().item() if theirs.numel() else 0.0)
        allowed = scale * (4 * rounding * torch.finfo(torch.float32).eps + torch.finfo(theirs.dtype).eps)
        assert worst_error(ours, theirs) <= allowed
