"""fused_spo_loss with every objective against eager autograd through full logits: loss, hidden.grad, weight.grad."""

import pytest
import torch

from spo_kernels import fused_spo_loss
from spo_kernels.losses import PairLogps, build_loss, needs_inputs, needs_reference
from spo_kernels.losses.pairs import coupling_of, token_outputs_of
from spo_kernels.testing import eager_logprob, random_batch, worst_error

from .cases import CASES
from .points import INPUTS

LENGTHS = [5, 1, 8, 3, 4, 6]  # three pairs, chosen first
VOCAB, HIDDEN = 29, 8
PAIRS = len(LENGTHS) // 2


def make_batch():
    """Responses behind two prompt tokens, and a reference near the policy."""
    batch = random_batch((2 * PAIRS, max(LENGTHS) + 2), VOCAB, HIDDEN, dtype=torch.float64, spread=2.0)
    for row, length in enumerate(LENGTHS):
        batch.labels[row, :2] = batch.labels[row, 2 + length :] = -100
    generator = torch.Generator().manual_seed(1)
    noise = 3 * torch.randn(2 * PAIRS, generator=generator, dtype=torch.float64)
    reference = eager_logprob(batch.hidden, batch.weight, batch.labels, dtype=torch.float64).sum(-1).detach() + noise
    draws = torch.rand(len(INPUTS), PAIRS, generator=generator, dtype=torch.float64)
    inputs = {n: low + (high - low) * u for (n, (low, high)), u in zip(INPUTS.items(), draws, strict=True)}
    return batch, reference, inputs


BATCH, REFERENCE, INPUT_VALUES = make_batch()
# those that need the reference's logits too are in tests/test_kl.py
FUSED = {
    label: case
    for label, case in CASES.items()
    if "kl" not in token_outputs_of(build_loss(case.name, **case.hyperparameters))
}


def leaves(dtype):
    return [tensor.to(dtype, copy=True).requires_grad_() for tensor in (BATCH.hidden, BATCH.weight)]


def pairs_of(hidden, weight, dtype):
    """The batch as an objective sees it, from logits in one precision."""
    logp, extras = eager_logprob(hidden, weight, BATCH.labels, dtype=dtype, outputs=("log_sum_p2",))
    inputs = {name: value.to(dtype) for name, value in INPUT_VALUES.items()}
    for name, values in (("logp", logp), ("log_sum_p2", extras["log_sum_p2"])):
        inputs[f"chosen_{name}"], inputs[f"rejected_{name}"] = values.detach().sum(-1).chunk(2)
    lengths = torch.tensor(LENGTHS)
    return PairLogps(*logp.sum(-1).chunk(2), *REFERENCE.to(dtype).chunk(2), *lengths.chunk(2), inputs=inputs)


def eager(case, dtype):
    """With the logits, the sums and the objective in one precision; the whole batch at once."""
    hidden, weight = leaves(dtype)
    pairs = pairs_of(hidden, weight, dtype)
    loss = build_loss(case.name, **case.hyperparameters)(pairs).mean()
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def fused(case, dtype, *, packed=False, **options):
    objective = build_loss(case.name, **case.hyperparameters)
    if needs_inputs(objective):
        options["pair_inputs"] = {name: INPUT_VALUES[name].to(dtype) for name in needs_inputs(objective)}
    if needs_reference(objective):
        options["ref_logps"] = REFERENCE.to(dtype)
    hidden, weight = leaves(dtype)
    states, labels = hidden, BATCH.labels
    if packed:
        keep = labels != -100
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
        states, labels, options["cu_seqlens"] = hidden[keep], labels[keep], bounds
    loss, _ = fused_spo_loss(states, weight, labels, loss=objective, **options)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def paths(case):
    objective = build_loss(case.name, **case.hyperparameters)
    if token_outputs_of(objective):
        return ("two_pass", "packed")
    separable = coupling_of(objective) != "batch"
    return ("two_pass", "packed", "factorised") if separable else ("two_pass",)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_float64(case, packed):
    truth = eager(case, torch.float64)
    for path in paths(case):
        found = fused(case, torch.float64, packed=packed, path=path, backend="torch")
        for name, value, wanted in zip(("loss", "hidden", "weight"), found, truth, strict=True):
            scale = 1 + wanted.abs().max()
            assert worst_error(value, wanted) <= 1e-12 * scale, (path, name)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_float32(backend, case, packed):
    """At most twice eager float32's own worst error, and eight roundings of the largest element."""
    truth, same = eager(case, torch.float64), eager(case, torch.float32)
    for path in paths(case):
        found = fused(case, torch.float32, packed=packed, path=path, backend=backend)
        for name, value, wanted, plain in zip(("loss", "hidden", "weight"), found, truth, same, strict=True):
            floor = 8 * torch.finfo(torch.float32).eps * (1 + wanted.abs().max())
            assert worst_error(value, wanted) <= 2 * worst_error(plain, wanted) + floor, (path, name)


class Spy:
    """An objective that keeps what it was given."""

    def __init__(self, objective):
        self.objective = objective
        self.token_outputs = token_outputs_of(objective)

    def __call__(self, pairs):
        self.pairs = pairs
        pairs.chosen.retain_grad(), pairs.rejected.retain_grad()
        return self.objective(pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_half_precision_hidden_states_give_the_same_coefficients(case, dtype):
    """Coefficients in float32 from half-precision states, against float64 from the same states."""
    objective = build_loss(case.name, **case.hyperparameters)
    hidden, weight = (tensor.to(dtype) for tensor in (BATCH.hidden, BATCH.weight))
    found, wanted = Spy(objective), Spy(build_loss(case.name, **case.hyperparameters))
    options = {"ref_logps": REFERENCE.float()}
    if needs_inputs(objective):
        options["pair_inputs"] = {name: INPUT_VALUES[name].float() for name in needs_inputs(objective)}
    loss, _ = fused_spo_loss(hidden.requires_grad_(), weight, BATCH.labels, loss=found, **options)
    loss.backward()
    wanted(pairs_of(hidden.double(), weight.double(), torch.float64)).mean().backward()
    for side in ("chosen", "rejected"):
        coefficient, truth = getattr(found.pairs, side).grad, getattr(wanted.pairs, side).grad
        assert (coefficient is None) == (truth is None), side
        if truth is not None:
            assert coefficient.dtype == torch.float32
            torch.testing.assert_close(coefficient.double(), truth, rtol=2e-4, atol=1e-6)
