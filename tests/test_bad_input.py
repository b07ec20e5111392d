"""Bad input: one error per mistake, raised before any kernel runs, naming the argument and what came."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spo_kernels import LMHead, fused_spo_loss, linear_logprob, sequence_logps
from spo_kernels.losses import DPO, SPO

WRONG = (TypeError, ValueError)  # where the specification leaves the choice open


def raises(error, patterns, function, **arguments):
    """Every pattern occurs in the message, whatever the order."""
    with pytest.raises(error) as caught:
        function(**arguments)
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), f"{pattern!r} is not in: {caught.value}"


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


def elsewhere(*shape, **options):
    """On a device that the other arguments are not on."""
    with FakeTensorMode():
        return torch.zeros(*shape, device="cuda", **options)


def head(bias=None, **transform):
    return LMHead(zeros(11, 8), bias, **transform)


def with_label(position, value):
    labels = torch.zeros(2, 3, dtype=torch.int64)
    labels[position] = value
    return labels


# id: what differs from a valid call, the error, what its message holds
LOGPROB = {
    "hidden-list": (dict(hidden=[[1.0]]), TypeError, ["hidden", "list"]),
    "hidden-scalar": (dict(hidden=torch.tensor(1.0)), ValueError, ["hidden"]),
    "hidden-integer": (dict(hidden=zeros(2, 3, 8, dtype=torch.int64)), TypeError, ["hidden", "int64"]),
    "hidden-complex": (dict(hidden=zeros(2, 3, 8, dtype=torch.complex64)), TypeError, ["hidden", "complex64"]),
    "head-none": (dict(head=None), TypeError, ["head must be a weight", "None"]),
    "head-linear": (dict(head=torch.nn.Linear(8, 11)), TypeError, ["head", "Linear", r"LMHead\(weight, bias\)"]),
    "head-module": (dict(head=torch.nn.Identity()), TypeError, ["head", "Identity", r"LMHead\.of"]),
    "head-1d": (dict(head=zeros(8)), ValueError, ["head", r"\b8\b"]),
    "head-3d": (dict(head=zeros(1, 11, 8)), ValueError, ["head", "1, 11, 8"]),
    "head-width": (dict(head=zeros(11, 9)), ValueError, ["head", "11, 9", r"\b8\b"]),
    "head-transposed": (dict(head=zeros(8, 11)), ValueError, ["head", "8, 11"]),
    "head-empty": (dict(head=zeros(0, 8)), ValueError, ["head", "0, 8"]),
    "head-dtype": (dict(head=zeros(11, 8, dtype=torch.float64)), WRONG, ["head", "float64", "float32"]),
    "head-integer": (dict(head=zeros(11, 8, dtype=torch.int8)), WRONG, ["head", "int8"]),
    "head-device": (dict(head=elsewhere(11, 8)), ValueError, ["head", "cuda", "cpu"]),
    "head-meta": (dict(head=zeros(11, 8, device="meta")), TypeError, ["head", "meta", "to_empty"]),
    "head-weight-list": (dict(head=LMHead([[1.0]])), TypeError, [r"head\.weight", "list"]),
    "head-weight-width": (dict(head=LMHead(zeros(11, 9))), ValueError, [r"head\.weight", "11, 9", r"\b8\b"]),
    "bias-list": (dict(head=head(bias=[0.0] * 11)), TypeError, [r"head\.bias", "list"]),
    "bias-length": (dict(head=head(bias=zeros(10))), ValueError, [r"head\.bias", r"\b10\b", r"\b11\b"]),
    "bias-2d": (dict(head=head(bias=zeros(1, 11))), ValueError, [r"head\.bias", "1, 11"]),
    "bias-dtype": (
        dict(head=head(bias=zeros(11, dtype=torch.bfloat16))),
        WRONG,
        [r"head\.bias", "bfloat16", "float32"],
    ),
    "bias-device": (dict(head=head(bias=elsewhere(11))), ValueError, [r"head\.bias", "cuda", "cpu"]),
    "labels-list": (dict(labels=[[0] * 3] * 2), TypeError, ["labels", "list"]),
    "labels-shape": (dict(labels=zeros(3, 2, dtype=torch.int64)), ValueError, ["labels", "3, 2", "2, 3"]),
    "labels-ndim": (dict(labels=zeros(2, 3, 1, dtype=torch.int64)), ValueError, ["labels", "2, 3, 1"]),
    "labels-int32": (dict(labels=zeros(2, 3, dtype=torch.int32)), TypeError, ["labels", "int64", "int32"]),
    "labels-float": (dict(labels=zeros(2, 3)), TypeError, ["labels", "int64", "float32"]),
    "labels-bool": (dict(labels=zeros(2, 3, dtype=torch.bool)), TypeError, ["labels", "int64", "bool"]),
    "labels-device": (dict(labels=elsewhere(2, 3, dtype=torch.int64)), ValueError, ["labels", "cuda"]),
    "label-too-large": (dict(labels=with_label((1, 2), 11)), IndexError, [r"labels\[1, 2\] = 11 is outside \[0, 11\)"]),
    "label-negative": (dict(labels=with_label((0, 1), -1)), IndexError, [r"labels\[0, 1\] = -1 is outside \[0, 11\)"]),
    "label-huge": (dict(labels=with_label((0, 0), 2**62)), IndexError, [rf"labels\[0, 0\] = {2**62} is outside"]),
    "label-is-the-usual-ignore-index": (
        dict(labels=with_label((1, 0), -100), ignore_index=-1),
        IndexError,
        [r"labels\[1, 0\] = -100 is outside \[0, 11\)"],
    ),
    "label-with-shift": (
        dict(labels=with_label((1, 2), 12), shift=True),
        IndexError,
        [r"labels\[1, 2\] = 12 is outside \[0, 11\)"],
    ),
    "ignore-index-float": (dict(ignore_index=0.5), TypeError, ["ignore_index", r"float|0\.5"]),
    "outputs-unknown": (dict(outputs=("lse", "top1")), ValueError, ["outputs", "log_sum_p2", r"got \['top1'\]"]),
    "ignore-index-huge": (dict(ignore_index=2**70), ValueError, ["ignore_index", "64 bits"]),
    "hidden-negated": (dict(hidden=torch._neg_view(zeros(2, 3, 8))), TypeError, ["hidden", "resolve_neg"]),
    "bias-negated": (dict(head=head(bias=torch._neg_view(zeros(11)))), TypeError, [r"head\.bias", "resolve_neg"]),
    "outputs-none": (dict(outputs=None), ValueError, ["outputs", "None"]),
    "outputs-once": (dict(outputs=iter(["lse"])), ValueError, ["outputs", "iterator"]),
    "outputs-string": (dict(outputs="entropy"), WRONG, ["outputs"]),
    "backend-unknown": (dict(backend="cuda9"), ValueError, ["backend", "cuda9", "torch"]),
    "workspace-zero": (dict(workspace_bytes=0), ValueError, ["workspace_bytes", r"\b0\b"]),
    "workspace-negative": (dict(workspace_bytes=-5), ValueError, ["workspace_bytes", "-5"]),
    "workspace-impossible": (dict(workspace_bytes=1), ValueError, ["workspace_bytes", r"\b1\b", "small"]),
    "workspace-float": (dict(workspace_bytes=1e6), TypeError, ["workspace_bytes", r"float|1000000\.0"]),
    "workspace-string": (dict(workspace_bytes="32M"), TypeError, ["workspace_bytes", "str|'32M'"]),
    "shift-without-positions": (
        dict(hidden=zeros(8), labels=torch.tensor(0), shift=True),
        ValueError,
        ["shift"],
    ),
    "shift-string": (dict(shift="no"), TypeError, ["shift must be True or False", "'no'"]),
    "shift-number": (dict(shift=1), TypeError, ["shift must be True or False", "1"]),
}


@pytest.mark.parametrize(("changes", "error", "patterns"), LOGPROB.values(), ids=LOGPROB)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad], ids=["grad", "no-grad"])
def test_linear_logprob(changes, error, patterns, mode):
    valid = dict(hidden=zeros(2, 3, 8), head=zeros(11, 8), labels=torch.zeros(2, 3, dtype=torch.int64))
    with mode():
        linear_logprob(**valid)
        raises(error, patterns, linear_logprob, **valid | changes)


RENAMED = {
    "weight": ([fused_spo_loss, linear_logprob, sequence_logps], r"head=weight, or head=LMHead\(weight, \.\.\.\)"),
    "bias": ([fused_spo_loss, linear_logprob, sequence_logps], r"head=LMHead\(weight, bias\)"),
    "logit_scale": ([fused_spo_loss, linear_logprob, sequence_logps], r"head=LMHead\(weight, logit_scale="),
    "logit_softcap": ([fused_spo_loss, linear_logprob, sequence_logps], r"head=LMHead\(weight, logit_softcap="),
    "ref_weight": ([fused_spo_loss], "ref_head=ref_weight"),
    "ref_bias": ([fused_spo_loss], r"ref_head=LMHead\(ref_weight, ref_bias\)"),
    "spo_value": ([fused_spo_loss], r'pair_inputs=\{"spo_value": values\}'),
    "beta": ([fused_spo_loss], r"loss=DPO\(beta=0\.2\)"),
}


@pytest.mark.parametrize(("functions", "pattern"), RENAMED.values(), ids=RENAMED)
def test_arguments_of_earlier_versions(request, functions, pattern):
    """Each is answered with the new way, before anything else is looked at."""
    name = request.node.callspec.id
    for function in functions:
        arguments = dict(hidden=zeros(2, 3, 8), labels=torch.zeros(2, 3, dtype=torch.int64)) | {name: zeros(11)}
        raises(TypeError, [f"{function.__name__} takes no {name}=", pattern], function, **arguments)


@pytest.mark.parametrize("trained", [True, False])
def test_the_message_of_a_label_out_of_range(backend, trained):
    labels = torch.zeros(5, 20, dtype=torch.int64)
    labels[3, 17], labels[4, 0] = 152001, -7
    hidden, head = zeros(5, 20, 4, requires_grad=trained), zeros(151936, 4)
    message = re.escape("labels[3, 17] = 152001 is outside [0, 151936)")
    raises(IndexError, [message], linear_logprob, hidden=hidden, head=head, labels=labels, backend=backend)
    message = re.escape("labels[77] = 152001 is outside [0, 151936)")
    flat = dict(hidden=hidden.flatten(0, 1), head=head, labels=labels.flatten(), backend=backend)
    raises(IndexError, [message], linear_logprob, **flat)


_WITHOUT_NATIVE_CODE = """
import sys
sys.modules["spo_kernels._C"] = None  # as if it had not been built
import torch
from spo_kernels import backend_info, linear_logprob
status = backend_info()["cpp"]
assert not status.available and status.detail, status
arguments = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(3, dtype=torch.int64)
assert linear_logprob(*arguments).isfinite().all()
try:
    linear_logprob(*arguments, backend="cpp")
except RuntimeError as error:
    assert "cpp" in str(error) and status.detail in str(error), error
else:
    raise AssertionError("backend='cpp' was accepted")
"""


def test_a_missing_backend_says_why(tmp_path):
    """Nothing built and no compiler: automatic choice falls back, an explicit one is an error with the reason."""
    bare = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    bare |= {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", _WITHOUT_NATIVE_CODE], capture_output=True, text=True, env=bare)
    assert run.returncode == 0, run.stderr


def test_an_unknown_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("SPO_BACKEND", "cuda9")
    arguments = dict(hidden=zeros(3, 8), head=zeros(5, 8), labels=torch.zeros(3, dtype=torch.int64))
    raises(ValueError, ["SPO_BACKEND", "cuda9"], linear_logprob, **arguments)


def test_double_backward_is_refused(backend):
    hidden, weight = torch.ones(3, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
    logp = linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.int64), backend=backend)
    with pytest.raises(RuntimeError, match=r"(?i)double backward|twice|once_differentiable"):
        (first,) = torch.autograd.grad(logp.sum(), hidden, create_graph=True)
        torch.autograd.grad(first.sum(), weight)


# ---- packed sequences

PACKED = {
    "decreasing": ([0, 4, 3, 6, 6], ValueError, ["cu_seqlens", "decreas"]),
    "does-not-end-at-n": ([0, 1, 2, 3, 5], ValueError, ["cu_seqlens", r"\b5\b", r"\b6\b"]),
    "beyond-n": ([0, 1, 2, 3, 7], ValueError, ["cu_seqlens", r"\b7\b", r"\b6\b"]),
    "does-not-start-at-0": ([1, 2, 3, 4, 6], ValueError, ["cu_seqlens", r"\b0\b", r"\b1\b"]),
    "empty": ([], ValueError, ["cu_seqlens"]),
    "float": ([0.0, 1.0, 2.0, 3.0, 6.0], TypeError, ["cu_seqlens", "float32"]),
    "two-dimensional": ([[0, 1, 2, 3, 6]], ValueError, ["cu_seqlens", "1, 5"]),
}


@pytest.mark.parametrize(("bounds", "error", "patterns"), PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("function", [sequence_logps, fused_spo_loss])
def test_cu_seqlens(function, bounds, error, patterns):
    valid = dict(hidden=zeros(6, 8), head=zeros(11, 8), labels=torch.zeros(6, dtype=torch.int64))
    if function is fused_spo_loss:
        valid["ref_logps"] = zeros(4)
    function(**valid, cu_seqlens=torch.tensor([0, 1, 2, 3, 6]))
    bounds = torch.tensor(bounds) if bounds else torch.zeros(0, dtype=torch.int64)
    raises(error, patterns, function, **valid, cu_seqlens=bounds)


def test_cu_seqlens_of_padded_hidden():
    for function in (sequence_logps, fused_spo_loss):
        arguments = dict(hidden=zeros(2, 3, 8), head=zeros(11, 8), labels=torch.zeros(2, 3, dtype=torch.int64))
        raises(ValueError, ["labels", "2, 3"], function, **arguments, cu_seqlens=torch.tensor([0, 3, 6]))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("shape", [(3,), (7,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_labels_of_another_shape(layout, shape, shift):
    """The shift looks at labels early; a wrong shape must not surface there as somebody else's error."""
    labels = torch.zeros(shape, dtype=torch.int64)
    arguments = dict(head=zeros(11, 8), labels=labels, shift=shift)
    if layout == "packed":
        arguments |= dict(hidden=zeros(6, 8), cu_seqlens=torch.tensor([0, 1, 4, 5, 6]))
    else:
        arguments |= dict(hidden=zeros(2, 2, 8))
    raises(ValueError, ["labels"], sequence_logps, **arguments)
    raises(ValueError, ["labels"], fused_spo_loss, **arguments, ref_logps=zeros(4 if layout == "packed" else 2))


def test_flat_hidden_without_cu_seqlens():
    for function in (sequence_logps, fused_spo_loss):
        arguments = dict(hidden=zeros(6, 8), head=zeros(11, 8), labels=torch.zeros(6, dtype=torch.int64))
        raises(ValueError, ["labels", "cu_seqlens"], function, **arguments)


# ---- the loss


def nan():
    return float("nan")


LOSS = {
    "odd-rows": (
        dict(hidden=zeros(3, 3, 8), labels=torch.zeros(3, 3, dtype=torch.int64)),
        ValueError,
        ["labels", r"\b3\b"],
    ),
    "odd-sequences": (
        dict(
            hidden=zeros(6, 8),
            labels=torch.zeros(6, dtype=torch.int64),
            cu_seqlens=torch.tensor([0, 2, 4, 6]),
            ref_logps=zeros(3),
        ),
        ValueError,
        ["cu_seqlens", r"\b[34]\b"],
    ),
    "label": (
        dict(labels=torch.full((4, 3), 11)),
        IndexError,
        [r"labels\[0, 0\] = 11 is outside \[0, 11\)"],
    ),
    "ref-logps-per-pair": (dict(ref_logps=zeros(2)), ValueError, ["ref_logps", r"\b2\b", r"\b4\b"]),
    "ref-logps-too-long": (dict(ref_logps=zeros(4, 5)), ValueError, ["ref_logps", "4, 5"]),
    "ref-logps-list": (dict(ref_logps=[0.0] * 4), TypeError, ["ref_logps", "list"]),
    "ref-logps-integer": (dict(ref_logps=zeros(4, dtype=torch.int64)), TypeError, ["ref_logps", "int64"]),
    "ref-logps-half": (
        dict(ref_logps=zeros(4, dtype=torch.bfloat16)),
        TypeError,
        ["ref_logps must be float32 or float64", "bfloat16"],
    ),
    "token-metrics-string": (dict(token_metrics="no"), TypeError, ["token_metrics must be True or False", "'no'"]),
    "pair-logps-string": (dict(pair_logps="no"), TypeError, ["pair_logps must be True or False", "'no'"]),
    "ref-logps-device": (dict(ref_logps=elsewhere(4)), ValueError, ["ref_logps", "cuda", "cpu"]),
    "no-reference": (dict(ref_logps=None), ValueError, ["ref_logps", "ref_hidden", "ref_head"]),
    "two-references": (
        dict(ref_hidden=zeros(4, 3, 8), ref_head=zeros(11, 8)),
        ValueError,
        ["ref_logps", "ref_hidden"],
    ),
    "ref-hidden-without-head": (dict(ref_logps=None, ref_hidden=zeros(4, 3, 8)), ValueError, ["ref_head"]),
    "ref-head-without-hidden": (dict(ref_logps=None, ref_head=zeros(11, 8)), ValueError, ["ref_hidden"]),
    "ref-hidden-shape": (
        dict(ref_logps=None, ref_hidden=zeros(4, 2, 8), ref_head=zeros(11, 8)),
        ValueError,
        ["ref_hidden", "4, 2"],
    ),
    "ref-head-width": (
        dict(ref_logps=None, ref_hidden=zeros(4, 3, 8), ref_head=zeros(11, 9)),
        ValueError,
        ["ref_head", "11, 9"],
    ),
    "ref-head-dtype": (
        dict(ref_logps=None, ref_hidden=zeros(4, 3, 8), ref_head=zeros(11, 8, dtype=torch.bfloat16)),
        WRONG,
        ["ref_head", "bfloat16"],
    ),
    "ref-hidden-integer": (
        dict(ref_logps=None, ref_hidden=zeros(4, 3, 8, dtype=torch.int64), ref_head=zeros(11, 8)),
        TypeError,
        ["ref_hidden", "int64"],
    ),
    "ref-head-list": (dict(ref_logps=None, ref_hidden=zeros(4, 3, 8), ref_head=[1.0]), TypeError, ["ref_head", "list"]),
    "ref-head-without-the-policy's-softcap": (
        dict(
            head=head(logit_softcap=5.0, logit_scale=0.5),
            ref_logps=None,
            ref_hidden=zeros(4, 3, 8),
            ref_head=zeros(11, 8),
        ),
        ValueError,
        ["ref_head", r"0\.5", r"5\.0", "LMHead"],
    ),
    "ref-bias-length": (
        dict(ref_logps=None, ref_hidden=zeros(4, 3, 8), ref_head=head(bias=zeros(3))),
        ValueError,
        [r"ref_head\.bias", r"\b3\b"],
    ),
    "loss-unknown": (dict(loss="dpoo"), ValueError, ["loss", "dpoo", r"\bdpo\b", r"\bspo\b"]),
    "loss-not-callable": (dict(loss=3), TypeError, ["loss", r"int|\b3\b"]),
    "loss-class": (dict(loss=DPO), WRONG, ["loss", "DPO"]),
    "objective-scalar": (dict(loss=lambda pairs: pairs.chosen.mean()), ValueError, ["loss|objective", r"\(2,\)|\[2\]"]),
    "objective-per-sequence": (
        dict(loss=lambda pairs: torch.cat([pairs.chosen, pairs.rejected])),
        ValueError,
        ["loss|objective", r"\(2,\)|\[2\]", r"\(4,\)|\[4\]"],
    ),
    "objective-detached": (
        dict(loss=lambda pairs: (pairs.chosen - pairs.rejected).detach(), hidden=zeros(4, 3, 8).requires_grad_()),
        ValueError,
        ["objective", r"do not depend on pairs\.chosen"],
    ),
    "objective-reference": (
        dict(loss=lambda pairs: pairs.chosen - pairs.ref_chosen, ref_logps=None),
        ValueError,
        ["no reference", "pass ref_logps", "ref_hidden"],
    ),
    "objective-float": (dict(loss=lambda pairs: 0.5), WRONG, ["loss|objective", "float"]),
    "spo-value-missing": (
        dict(loss=SPO(DPO(), penalty="hinge", value="input")),
        ValueError,
        ["spo_value"],
    ),
    "spo-value-shape": (
        dict(loss=SPO(DPO(), penalty="hinge", value="input"), pair_inputs={"spo_value": zeros(4)}),
        ValueError,
        ["spo_value", r"\b4\b", r"\b2\b"],
    ),
    "spo-value-list": (
        dict(loss=SPO(DPO(), penalty="hinge", value="input"), pair_inputs={"spo_value": [0.0, 0.0]}),
        TypeError,
        ["spo_value", "list"],
    ),
    "hinge-without-reference": (
        dict(loss=SPO(DPO(reference_free=True), penalty="hinge"), ref_logps=None),
        ValueError,
        ["ref_logps|reference"],
    ),
    "reduction-unknown": (dict(reduction="avg"), ValueError, ["reduction", "avg", "mean", "sum", "none"]),
    "pair-inputs-list": (dict(pair_inputs=[zeros(2)]), TypeError, ["pair_inputs", "list"]),
    "backend": (dict(backend="cuda9"), ValueError, ["backend", "cuda9"]),
    "workspace": (dict(workspace_bytes=0), ValueError, ["workspace_bytes"]),
}


@pytest.mark.parametrize(("changes", "error", "patterns"), LOSS.values(), ids=LOSS)
def test_fused_spo_loss(changes, error, patterns):
    valid = dict(
        hidden=zeros(4, 3, 8),
        head=zeros(11, 8),
        labels=torch.zeros(4, 3, dtype=torch.int64),
        ref_logps=zeros(4),
        loss="dpo",
    )
    fused_spo_loss(**valid)
    raises(error, patterns, fused_spo_loss, **valid | changes)
