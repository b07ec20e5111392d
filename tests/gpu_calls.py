"""Every public call as a step forward and backward, for tensors on a CPU or on what says it is a GPU."""

import torch

from spo_kernels import LMHead, fused_spo_loss, linear_kl, linear_logprob, linear_token_loss, sequence_logps
from spo_kernels.losses import DPO, IPO, SPO
from spo_kernels.testing import random_batch

PAIRS, TOKENS, VOCAB, WIDTH = 2, 6, 197, 16


def inputs(place, dtype, trained=True):
    """Hidden states, weight, bias and labels, of which some are ignored; an odd vocabulary."""
    batch = random_batch((2 * PAIRS, TOKENS), VOCAB, WIDTH, dtype=dtype, bias=True, ignored=0.3)
    values = [place(value.clone()) for value in (batch.hidden, batch.weight, batch.bias, batch.labels)]
    for value, needs in zip(values, (True, trained, trained), strict=False):
        value.requires_grad_(needs)
    return values


def _loss(loss=None, trained=True, shift=False, weights=False, onto=False, **options):
    def call(place, dtype, backend):
        hidden, weight, bias, labels = inputs(place, dtype, trained)
        if onto:
            weight.grad = place(torch.ones(weight.shape, dtype=dtype))
        if weights:
            options["token_weights"] = place(torch.linspace(0, 2, labels.numel()).view(labels.shape))
        head = LMHead(weight, bias, logit_softcap=3.0, accumulate=onto)
        reference = place(torch.linspace(-30, -20, 2 * PAIRS))
        given = {"loss": loss or DPO(beta=0.5), "ref_logps": reference, "shift": shift, "backend": backend}
        value, metrics = fused_spo_loss(hidden, head, labels, **given, **options)
        torch.autograd.backward([value])
        return [value, *metrics.values(), hidden.grad, weight.grad, bias.grad]

    return call


def _tokens(function, trained=True, **options):
    def call(place, dtype, backend):
        hidden, weight, bias, labels = inputs(place, dtype, trained)
        found = function(hidden, LMHead(weight, bias), labels, backend=backend, **options)
        values = [found] if isinstance(found, torch.Tensor) else [found[0], *found[1].values()]
        torch.autograd.backward([values[0].sum()])
        return [*values, hidden.grad, weight.grad, bias.grad]

    return call


def _token_loss(place, dtype, backend):
    hidden, weight, bias, labels = inputs(place, dtype)
    upstream = place(torch.linspace(-1, 1, labels.numel()).view(labels.shape))
    loss, logp = linear_token_loss(
        hidden, LMHead(weight, bias), labels, lambda logp, at: upstream[at] * logp.exp(), backend=backend
    )
    torch.autograd.backward([loss])
    return [loss, logp, hidden.grad, weight.grad, bias.grad]


def _kl(place, dtype, backend):
    hidden, weight, bias, labels = inputs(place, dtype)
    theirs = [value.detach() * 0.5 for value in (hidden, weight, bias)]
    found = linear_kl(hidden, LMHead(weight, bias), theirs[0], LMHead(*theirs[1:]), labels, backend=backend)
    torch.autograd.backward([found.sum()])
    return [found, hidden.grad, weight.grad, bias.grad]


LENGTHS, PLACES = ["computed.py: tolist"], ["tokens.py: nonzero"]
# name: the call, and what it waits for
CALLS = {
    "packed": (_loss(path="packed"), LENGTHS),
    "packed, small tiles": (_loss(path="packed", workspace_bytes=40_000), LENGTHS),
    "packed, spo, shifted": (_loss(SPO(DPO()), path="packed", shift=True), LENGTHS),
    "packed, metrics": (_loss(path="packed", token_metrics=True, pair_logps=True), LENGTHS),
    "packed, weights": (_loss(path="packed", weights=True), LENGTHS),
    "packed, onto a gradient": (_loss(path="packed", onto=True), LENGTHS),
    "two passes, onto a gradient": (_loss(path="two_pass", onto=True), LENGTHS),
    "factorised": (_loss(path="factorised", workspace_bytes=40_000), LENGTHS),
    "factorised, both sides, shifted": (_loss(SPO(IPO()), path="factorised", shift=True, weights=True), LENGTHS),
    "two passes": (_loss(path="two_pass", token_metrics=True), LENGTHS),
    "frozen": (_loss(trained=False), LENGTHS),
    "frozen, small tiles": (_loss(trained=False, workspace_bytes=20_000), LENGTHS),
    "linear_logprob": (_tokens(linear_logprob, outputs=("entropy", "lse")), PLACES),
    "linear_logprob, frozen": (_tokens(linear_logprob, trained=False, shift=True), PLACES),
    "sequence_logps": (_tokens(sequence_logps), PLACES),
    "linear_token_loss": (_token_loss, PLACES),
    "linear_kl": (_kl, PLACES),
}


def near(found, expected, dtype):
    """Equal up to the rounding of a tile that enters a product."""
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, other in zip(found, expected, strict=True):
        if other is None:
            assert ours is None
            continue
        ours, other = (getattr(value, "data_on_cpu", value).detach().double() for value in (ours, other))
        assert (ours - other).norm() <= limit * other.norm() + 1e-6
