"""Three products or four: every path gives the same numbers, costs what it says."""

import pytest
import torch

from spo_kernels import LMHead, backend_info, fused_spo_loss, linear_logprob, sequence_logps
from spo_kernels.backends.cpp_products import NativeProducts
from spo_kernels.backends.products import VendorProducts
from spo_kernels.engine import kept_space
from spo_kernels.losses import DPO, SPO
from spo_kernels.losses.pairs import PairLogps

HIDDEN, VOCAB = 24, 97
OBJECTIVES = {
    "dpo": DPO(beta=0.1),
    "dpo-reference-free": DPO(beta=0.3, reference_free=True),
    "spo-nll": SPO(DPO(beta=0.1)),
    "spo-hinge": SPO(DPO(beta=0.2), penalty="hinge", normalization="sum"),
}
# gradients of half precision are rounded where they are scaled and where they are handed over
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1.6e-2}
KINDS = [
    (torch.float64, "torch"),
    (torch.float32, "torch"),
    (torch.float32, "cpp"),
    (torch.bfloat16, "cpp"),
]


def batch(lengths, dtype, packed=False, bias=True, logit_softcap=None):
    """Pairs of the given response lengths with a two-token prompt, and everything that requires a gradient."""
    torch.manual_seed(1)
    sequences, width = len(lengths), max(lengths) + 2
    labels = torch.full((sequences, width), -100)
    for row, length in enumerate(lengths):
        labels[row, 2 : 2 + length] = torch.randint(0, VOCAB, (length,))
    leaves = [torch.randn(sequences, width, HIDDEN), torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB)]
    hidden, weight, head_bias = (leaf.to(dtype).requires_grad_() for leaf in leaves)
    arguments = {"ref_logps": 3 * torch.randn(sequences), "shift": True, "token_metrics": True}
    head = LMHead(weight, head_bias if bias else None, logit_scale=0.9, logit_softcap=logit_softcap)
    states = hidden
    if packed:
        arguments["cu_seqlens"] = torch.arange(0, sequences * width + 1, width)
        states, labels = hidden.view(-1, HIDDEN), labels.view(-1)
    return (hidden, weight, *([head_bias] if bias else [])), (states, head, labels), arguments


def gradients(path, lengths, dtype, backend, workspace_bytes=1 << 20, upstream=1.7, **options):
    made = {name: options.pop(name) for name in ("packed", "bias", "logit_softcap") if name in options}
    leaves, tensors, arguments = batch(lengths, dtype, **made)
    loss, metrics = fused_spo_loss(
        *tensors, path=path, backend=backend, workspace_bytes=workspace_bytes, **arguments, **options
    )
    (upstream * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)], metrics


def need(backend):
    status = backend_info()[backend]
    if not status.available:
        pytest.skip(f"{backend}: {status.detail}")


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("lengths", [[5, 3, 7, 0], [9, 4], [0, 0, 3, 2], [0, 5], [6] * 8], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype, backend", KINDS, ids=str)
def test_paths_agree(dtype, backend, objective, lengths):
    need(backend)
    check_paths(dtype, backend, objective, lengths)


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("columns", [40, 96], ids=["40-40-17", "96-1"])
@pytest.mark.parametrize("objective", ["dpo", "spo-hinge"])
@pytest.mark.parametrize("dtype, backend", KINDS, ids=str)
def test_paths_agree_slice_by_slice(monkeypatch, dtype, backend, objective, columns):
    """With the vocabulary in several slices, whose maxima rise and fall; the widest is larger on real vocabularies."""
    need(backend)
    monkeypatch.setitem(kept_space._COLUMNS, "cpu", columns)
    monkeypatch.setattr(VendorProducts, "own_product", lambda self, dtype: "torch's, which would take all at once")
    check_paths(dtype, backend, objective, [5, 3, 7, 0])


def check_paths(dtype, backend, objective, lengths):
    for options in ({}, {"logit_softcap": 4.0, "packed": True}, {"bias": False, "reduction": "sum"}):
        options["loss"] = OBJECTIVES[objective]
        expected, expected_metrics = gradients("two_pass", lengths, dtype, backend, **options)
        for path in ("packed", "factorised"):
            found, metrics = gradients(path, lengths, dtype, backend, **options)
            for name, reference, value in zip(("loss", "hidden", "weight", "bias"), expected, found, strict=False):
                scale = reference.double().abs().max().clamp_min(1e-9)
                error = (value.double() - reference.double()).abs().max() / scale
                assert error <= TOLERANCE[dtype], (path, name, error.item())
            for name, reference in expected_metrics.items():
                torch.testing.assert_close(metrics[name], reference, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("path, rows", [("packed", 11), ("factorised", 4)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_small_workspace_takes_several_tiles(objective, path, rows):
    lengths = [5, 3, 4, 6, 2, 1]
    accumulators = {"packed": 0, "factorised": 1 if objective.startswith("dpo") else 2}[path]
    row_bytes = VOCAB * 11 + HIDDEN * 16  # 8 bytes a logit and 2.5 for temporaries
    workspace = accumulators * VOCAB * HIDDEN * 8 + rows * row_bytes
    options = {"loss": OBJECTIVES[objective], "workspace_bytes": workspace}
    expected, _ = gradients("two_pass", lengths, torch.float64, "torch", loss=OBJECTIVES[objective])
    found, _ = gradients(path, lengths, torch.float64, "torch", **options)
    for reference, value in zip(expected, found, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)


@pytest.fixture
def cells(monkeypatch):
    """Of each product: rows, columns and what is summed, multiplied."""
    found = []
    for owner in (VendorProducts, NativeProducts):
        original = owner.matmul

        def counted(self, a, b, out, *, a_rows=None, original=original, owner=owner, **options):
            if type(self) is owner:
                rows = a.shape[0] if a_rows is None else a_rows.numel()
                found.append(rows * a.shape[1] * b.shape[1])
            original(self, a, b, out, a_rows=a_rows, **options)

        monkeypatch.setattr(owner, "matmul", counted)
    return found


@pytest.mark.parametrize("path, products", [("packed", 3), ("factorised", 3), ("two_pass", 4)])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_products_are_counted(cells, backend, path, products):
    need(backend)
    lengths = [5, 3, 7, 2]
    gradients(path, lengths, torch.float32, backend, loss="dpo")
    assert sum(cells) == products * sum(lengths) * HIDDEN * VOCAB


@pytest.mark.parametrize("function", [fused_spo_loss, linear_logprob, sequence_logps])
def test_without_gradients_there_is_one_product(cells, function):
    """Also where hidden states and head are leaves that require one."""
    lengths = [5, 3, 7, 2]
    _, tensors, arguments = batch(lengths, torch.float32)
    options = {"loss": "dpo", "ref_logps": arguments["ref_logps"]} if function is fused_spo_loss else {}
    with torch.no_grad():
        function(*tensors, shift=True, **options)
    assert sum(cells) == sum(lengths) * HIDDEN * VOCAB


def test_upstream_and_accumulation():
    lengths = [5, 3, 7, 2]
    leaves, tensors, arguments = batch(lengths, torch.float64)
    for path, upstream in (("packed", 2.0), ("factorised", -3.0)):
        loss, _ = fused_spo_loss(*tensors, loss="dpo", path=path, **arguments)
        (upstream * loss).backward()
    expected, _ = gradients("two_pass", lengths, torch.float64, "torch", upstream=-1.0, loss="dpo")
    for leaf, reference in zip(leaves, expected[1:], strict=True):
        torch.testing.assert_close(leaf.grad, reference, rtol=1e-12, atol=1e-12)


def test_gradients_are_given_out_once():
    _, tensors, arguments = batch([3, 2], torch.float32)
    loss, _ = fused_spo_loss(*tensors, path="packed", **arguments)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"given out once.*path='two_pass'"):
        loss.backward()


@pytest.mark.parametrize("path", ["packed", "factorised"])
def test_double_backward_is_refused(path):
    _, tensors, arguments = batch([3, 2], torch.float32)
    loss, _ = fused_spo_loss(*tensors, path=path, **arguments)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        torch.autograd.grad(loss, tensors[1].weight, create_graph=True)


@pytest.mark.parametrize("path", ["packed", "factorised"])
def test_autocast(path):
    (hidden, weight), tensors, arguments = batch([5, 3], torch.float32, bias=False)
    results = []
    for chosen in ("two_pass", path):
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = fused_spo_loss(*tensors, path=chosen, loss="dpo", **arguments)
        loss.backward()
        assert hidden.grad.dtype == weight.grad.dtype == torch.float32
        results.append((loss.detach(), hidden.grad, weight.grad))
    for reference, value in zip(*results, strict=True):
        torch.testing.assert_close(value, reference, rtol=0, atol=1.6e-2 * reference.abs().max().item())


def test_undeclared_objective_takes_two_passes():
    def own(pairs: PairLogps):
        return -(pairs.chosen - pairs.rejected)

    _, tensors, arguments = batch([5, 3], torch.float32)
    loss, _ = fused_spo_loss(*tensors, loss=own, **arguments)
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(ValueError, match="path = 'packed' cannot be taken: its objective couples pairs"):
        fused_spo_loss(*tensors, loss=own, path="packed", **arguments)
    with pytest.raises(ValueError, match="path must be one of 'packed', 'factorised', 'two_pass', got 'fast'"):
        fused_spo_loss(*tensors, path="fast", **arguments)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_float16_takes_two_passes(backend):
    """Unscaled gradients would be rounded below its range before a scaled loss reaches them."""
    need(backend)
    lengths = [0, 5]
    with pytest.raises(ValueError, match="path = 'packed' cannot be taken: unscaled gradients may lie below float16"):
        gradients("packed", lengths, torch.float16, backend)
    small = {"loss": DPO(beta=1e-4), "upstream": 1e5}
    expected, _ = gradients("two_pass", lengths, torch.float16, backend, **small)
    found, _ = gradients(None, lengths, torch.float16, backend, **small)
    for reference, value in zip(expected, found, strict=True):
        assert torch.equal(reference, value)
        assert reference.any()


@pytest.mark.parametrize("workspace_bytes", [4_000, 12_000, 30_000])
def test_no_token_in_a_small_workspace(workspace_bytes):
    """Either way there is nothing to plan; one row may not fit."""
    hidden, weight = torch.randn(2, 3, 1, requires_grad=True), torch.randn(2053, 1, requires_grad=True)
    labels, reference = torch.full((2, 3), -100), torch.zeros(2)
    options = {"loss": "dpo", "ref_logps": reference, "workspace_bytes": workspace_bytes}
    try:
        loss, _ = fused_spo_loss(hidden, weight, labels, path="factorised", **options)
    except ValueError as error:
        assert "path = 'factorised' cannot be taken: the workspace is too small" in str(error)
        loss, _ = fused_spo_loss(hidden, weight, labels, **options)
    loss.backward()
    assert not hidden.grad.any() and not weight.grad.any()
