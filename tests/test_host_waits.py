"""How often the host waits for a GPU, by public call and by file: on tensors that only say that they are on one."""

import pytest
import torch
from cuda_like import CudaLike, pretend_a_gpu

from spo_kernels import fused_spo_loss, linear_kl, linear_logprob, sequence_logps
from spo_kernels.testing import random_batch

BOUNDS = (0, 4, 11, 17, 24)
LENGTHS, PLACES = ["computed.py: tolist"], ["tokens.py: nonzero"]
# how much of the head's backward a sparse one takes decides what is launched
SPARSE = ["sparse.py: tolist"]

OPTIONS = {
    "plain": dict(),
    "small tiles": dict(workspace_bytes=20000),
    "shift": dict(shift=True),
    "token metrics": dict(token_metrics=True),
    "pair logps": dict(pair_logps=True),
    "weights": dict(token_weights="some"),
    "reference": dict(reference="model"),
    "weights of both": dict(reference="model", token_weights="some", ref_token_weights="some"),
    "spo": dict(loss="spo"),
    "batch's loss": dict(loss="aot", path=None),
    "draws tokens": dict(loss="sgdpo", reference="model", path=None),
    "sums of entropy": dict(loss="h_dpo", path=None),
    "frozen": dict(frozen=True, path=None),
}


@pytest.fixture
def waits(monkeypatch):
    return pretend_a_gpu(monkeypatch).waits


def inputs(packed):
    batch = random_batch((4, 6), 64, 16, ignored=0.3)
    hidden, labels, bounds = batch.hidden, batch.labels, {}
    if packed:
        hidden, labels = hidden.reshape(-1, 16), labels.reshape(-1)
        bounds["cu_seqlens"] = CudaLike(torch.tensor(BOUNDS))
    return CudaLike(hidden), CudaLike(batch.weight), CudaLike(labels), bounds


def step(packed, *, reference="sums", frozen=False, loss="dpo", **options):
    hidden, weight, labels, given = inputs(packed)
    if reference == "model":
        given |= {"ref_hidden": hidden.clone(), "ref_head": weight.clone()}
    else:
        given["ref_logps"] = CudaLike(torch.zeros(4))
    for name in ("token_weights", "ref_token_weights"):
        if name in options:
            options[name] = CudaLike(torch.rand(labels.shape).round())
    hidden.requires_grad_(), weight.requires_grad_(not frozen)
    value, _ = fused_spo_loss(hidden, weight, labels, loss=loss, backend="torch", **given, **options)
    torch.autograd.backward([value])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed sequences"])
@pytest.mark.parametrize("path", ["packed", "factorised", "two_pass"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_loss_waits_once_for_the_lengths(waits, options, path, packed):
    step(packed, **{"path": path, **options})
    assert waits == LENGTHS


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed sequences"])
@pytest.mark.parametrize("path", ["packed", "factorised", "two_pass"])
def test_nothing_is_waited_for_where_every_label_counts(waits, path, packed, shift):
    """And sequences have a common length, or bounds that the host has; the loss is what it was."""
    batch = random_batch((4, 6), 64, 16)
    hidden, labels, bounds = batch.hidden, batch.labels, {}
    if packed:
        hidden, labels, bounds = hidden.reshape(-1, 16), labels.reshape(-1), {"cu_seqlens": torch.tensor(BOUNDS)}

    def gradients(place, **options):
        leaves = [place(hidden.clone()).requires_grad_(), place(batch.weight.clone()).requires_grad_()]
        options |= {"shift": shift, "path": path, "backend": "torch", "loss": "dpo", **bounds}
        value, _ = fused_spo_loss(*leaves, place(labels), ref_logps=place(torch.zeros(4)), **options)
        torch.autograd.backward([value])
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    found = gradients(CudaLike, ignore_index=None)
    assert waits == []
    for ours, expected in zip(found, gradients(lambda tensor: tensor), strict=True):
        torch.testing.assert_close(ours.data_on_cpu, expected)


@pytest.mark.parametrize("shift", [False, True])
def test_log_probabilities_of_every_label(waits, shift):
    batch = random_batch((4, 6), 64, 16)
    for function in (linear_logprob, sequence_logps, linear_kl):
        hidden, weight = CudaLike(batch.hidden), CudaLike(batch.weight)
        reference = (hidden.clone(), weight.clone()) if function is linear_kl else ()
        hidden.requires_grad_(), weight.requires_grad_()
        options = {"backend": "torch", "shift": shift, "ignore_index": None}
        torch.autograd.backward([function(hidden, weight, *reference, CudaLike(batch.labels), **options).sum()])
        assert waits == [], function


def test_a_label_of_minus_one_counts_as_any_other_where_all_count():
    batch = random_batch((2, 3), 64, 16)
    batch.labels[0, 1] = -1
    with pytest.raises(IndexError, match=r"labels\[0, 1\] = -1 is outside"):
        linear_logprob(batch.hidden, batch.weight, batch.labels, ignore_index=None)


@pytest.mark.parametrize("mode", ["certified", "unbiased"])
def test_a_sparse_backward_waits_once_more(waits, mode):
    step(False, sparsity=mode)
    assert waits == LENGTHS + SPARSE


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed sequences"])
def test_log_probabilities_wait_once_for_the_places(waits, packed):
    for function in (linear_logprob, sequence_logps, linear_kl):
        hidden, weight, labels, bounds = inputs(packed)
        reference = (hidden.clone(), weight.clone()) if function is linear_kl else ()
        bounds = bounds if function is sequence_logps else {}
        found = function(
            hidden.requires_grad_(), weight.requires_grad_(), *reference, labels, backend="torch", **bounds
        )
        torch.autograd.backward([found.sum() if isinstance(found, torch.Tensor) else found[0].sum()])
        assert waits == PLACES, function
        waits.clear()


def test_what_counts_as_a_wait(waits):
    """The harness sees each kind, and where it is from."""
    values = CudaLike(torch.tensor([0.0, 1.0, 2.0]))
    for wait in (
        lambda: values[0].item(),
        lambda: bool(values[0]),
        lambda: values.tolist(),
        lambda: values.cpu(),
        lambda: values.nonzero(),
        lambda: values[values > 0],
        lambda: values.repeat_interleave(values.long()),
        lambda: torch.zeros(2).to(values.device),
        lambda: torch.tensor([1.0], device="cuda"),
    ):
        waits.clear()
        wait()
        assert len(waits) == 1 and waits[0].startswith("elsewhere: ")
    waits.clear()
    values.repeat_interleave(values.long(), output_size=3)
    torch.zeros(2, device="cuda").add_(1)
    assert waits == []
    with pytest.raises(RuntimeError, match=r"on the CPU, \[3\], among those on a GPU"):
        values + torch.zeros(3)
