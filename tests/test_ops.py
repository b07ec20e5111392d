"""The operators as PyTorch sees them: schema, fakes, torch.compile, autocast."""

import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spo_kernels import LMHead, fused_spo_loss, linear_kl, linear_logprob
from spo_kernels.engine import autograd, divergence_ops, tokens
from spo_kernels.preference import kernel
from spo_kernels.testing import check_linear_logprob, evaluate, random_batch, random_upstream

OUTPUTS = ("lse", "entropy", "correct", "log_sum_p2")
COMPILERS = ["aot_eager"]
if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
    COMPILERS.append("inductor")


class Recorder(TorchDispatchMode):
    """Notes each call of this package's own operators, as (operator, arguments, keyword arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "spo_kernels":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def through_operators(monkeypatch):
    """Calls go through the operators, as they do in a trace; elsewhere they save themselves the dispatch."""
    for module in (autograd, divergence_ops, kernel, tokens):
        monkeypatch.setattr(module, "is_traced", lambda tensor: True)


def test_operators_are_registered():
    for name in ("find_tokens", "linear_logprob_fwd", "linear_logprob_bwd", "linear_kl_fwd", "linear_kl_bwd"):
        assert torch._C._dispatch_has_kernel(f"spo_kernels::{name}"), name


def test_operators_with_cpu_tensors_stay_out_of_recorded_graphs():
    """What is on the CPU is told by fake tensors on a GPU; by its name also in the backward's schema."""
    with FakeTensorMode(), Recorder() as recorder:
        hidden = torch.empty(4, 5, 8, device="cuda")
        weight, labels = torch.empty(16, 8, device="cuda"), torch.empty(4, 5, dtype=torch.int64, device="cuda")
        reference = torch.empty(4, device="cuda")
        fused_spo_loss(hidden, weight, labels, loss="dpo", ref_logps=reference, backend="torch")
        linear_kl(hidden, weight, hidden, weight, labels, backend="torch")
    on_cpu = {
        argument.name
        for func, args, _ in recorder.calls
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if isinstance(value, torch.Tensor) and value.device.type == "cpu"
    }
    assert on_cpu == {"transform", "ref_transform", "total", "listed"}
    for name in ("find_tokens", "linear_logprob_fwd", "linear_logprob_bwd", "linear_kl_fwd", "linear_kl_bwd"):
        operator = getattr(torch.ops.spo_kernels, name).default
        named = {argument.name for argument in (*operator._schema.arguments, *operator._schema.returns)}
        assert named & on_cpu, name
        assert torch.Tag.cudagraph_unsafe in operator.tags, name
    assert torch.Tag.cudagraph_unsafe not in torch.ops.spo_kernels.pair_loss.default.tags


def test_a_loss_goes_through_its_operator(monkeypatch):
    through_operators(monkeypatch)
    batch = random_batch((4, 5), 29, 12)
    with Recorder() as recorder:
        options = {"loss": "dpo", "ref_logps": torch.zeros(4), "path": "two_pass", "backend": "cpp"}
        fused_spo_loss(batch.hidden, batch.weight, batch.labels, **options)
    (call,) = [call for call in recorder.calls if call[0].overloadpacket.__name__ == "pair_loss"]
    torch.library.opcheck(call[0], *call[1:])


OPERATORS = {
    "trained": (("hidden", "weight"), dict(), {}),
    "frozen": (("hidden",), dict(), {}),
    "weight": (("weight",), dict(), {}),
    "everything": (
        ("hidden", "weight", "bias"),
        dict(bias=True, ignored=0.4),
        dict(outputs=OUTPUTS, logit_scale=0.5, logit_softcap=4.0, shift=True, workspace_bytes=5000),
    ),
    "all-ignored": (("hidden", "weight"), dict(ignored=1.0), {}),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in OPERATORS), *((name, torch.bfloat16) for name in ("trained", "everything"))],
    ids=str,
)
def test_opcheck(monkeypatch, backend, name, dtype):
    """On the raw operators, with the very arguments that the public function sends."""
    trained, inputs, options = OPERATORS[name]
    batch = random_batch((3, 5), 29, 12, dtype=dtype, **inputs)
    upstream = random_upstream(batch, options.get("outputs", ()))
    through_operators(monkeypatch)
    with Recorder() as recorder:
        evaluate(linear_logprob, batch, upstream, trained=trained, backend=backend, **options)
    names = {func.overloadpacket.__name__ for func, _, _ in recorder.calls}
    assert names >= {"find_tokens", "linear_logprob_fwd"}
    if trained != ("hidden",):
        assert "linear_logprob_bwd" in names
    for func, args, kwargs in recorder.calls:
        args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        torch.library.opcheck(func, tuple(args), kwargs)


@pytest.mark.parametrize(
    ("compiler", "trained"),
    [*((name, ("hidden", "weight", "bias")) for name in COMPILERS), ("aot_eager", ("hidden",))],
    ids=[*(f"{name}-trained" for name in COMPILERS), "aot_eager-frozen"],
)
def test_compile_fullgraph(backend, compiler, trained):
    torch._dynamo.reset()
    options = dict(outputs=OUTPUTS, logit_scale=0.5, logit_softcap=4.0, shift=True, backend=backend)
    compiled = torch.compile(linear_logprob, backend=compiler, fullgraph=True)
    for shape in ((3, 5), (4, 7)):  # the second shape recompiles with symbolic sizes
        batch = random_batch(shape, 29, 12, bias=True, ignored=0.3)
        upstream = random_upstream(batch, OUTPUTS)
        eager = evaluate(linear_logprob, batch, upstream, trained=trained, **options)
        found = evaluate(compiled, batch, upstream, trained=trained, **options)
        assert found.keys() == eager.keys()
        for name in eager:
            assert torch.equal(found[name], eager[name]), name


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compile_around_the_primitive(backend, compiler):
    """A user's own loss: torch operations before and after, one graph, no break."""
    torch._dynamo.reset()
    batch = random_batch((4, 6), 29, 12, ignored=0.3)

    def loss_of(hidden, weight, labels):
        logp = linear_logprob(hidden * 2.0, weight, labels, backend=backend).sum(-1)
        chosen, rejected = logp.chunk(2)
        return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

    def run(function):
        hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
        loss = function(hidden, weight, batch.labels)
        loss.backward()
        return loss.detach(), hidden.grad, weight.grad

    compiled = run(torch.compile(loss_of, backend=compiler, fullgraph=True))
    for found, expected in zip(compiled, run(loss_of), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_compile_the_loss(backend, layout):
    torch._dynamo.reset()
    batch = random_batch((4, 6), 29, 12, ignored=0.3)
    hidden, labels, options = batch.hidden, batch.labels, {}
    if layout == "packed":
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        options = dict(cu_seqlens=torch.arange(5) * 6)
    reference = torch.arange(4.0) - 20

    def run(function):
        leaf = hidden.clone().requires_grad_()
        loss, metrics = function(leaf, batch.weight, labels, ref_logps=reference, backend=backend, **options)
        loss.backward()
        return loss.detach(), leaf.grad, *metrics.values()

    compiled = run(torch.compile(fused_spo_loss, backend="aot_eager"))
    for found, expected in zip(compiled, run(fused_spo_loss), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bounds", [(1, 3, 5, 9, 14), (0, 3, 5, 9, 12), (0, 5, 3, 9, 14)], ids=str)
def test_bounds_of_sequences_are_checked_when_compiled(bounds):
    torch._dynamo.reset()
    batch = random_batch((14,), 29, 12)
    compiled = torch.compile(fused_spo_loss, backend="aot_eager")
    compiled(batch.hidden, batch.weight, batch.labels, loss="simpo", cu_seqlens=torch.tensor([0, 3, 5, 9, 14]))
    with pytest.raises(RuntimeError, match="cu_seqlens must start at 0, end at N"):
        compiled(batch.hidden, batch.weight, batch.labels, loss="simpo", cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",), ()], ids=["all", "frozen", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fake_tensors(dtype, trained):
    """Shapes, dtypes and devices without data, as a tracer asks for them."""
    real = random_batch((3, 5), 29, 12, dtype=dtype, bias=True, ignored=0.3)
    with FakeTensorMode() as mode:
        leaves = {
            name: mode.from_tensor(getattr(real, name)).requires_grad_(name in trained)
            for name in ("hidden", "weight", "bias")
        }
        labels = mode.from_tensor(real.labels)
        head = LMHead(leaves["weight"], leaves["bias"])
        logp, extras = linear_logprob(leaves["hidden"], head, labels, outputs=OUTPUTS)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert logp.shape == (3, 5) and logp.dtype == expected
        for name, value in extras.items():
            assert value.shape == (3, 5)
            assert value.dtype == (torch.bool if name == "correct" else expected), name
        if trained:
            (logp.sum() + extras["entropy"].sum()).backward()
        for name in trained:
            assert leaves[name].grad.shape == leaves[name].shape
            assert leaves[name].grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)], ids=["trained", "frozen"])
def test_autocast(backend, dtype, trained):
    """Inside autocast, float32 inputs are cast as F.linear casts them; gradients come back in float32."""
    batch = random_batch((3, 5), 29, 12, bias=True, ignored=0.3)
    upstream = random_upstream(batch)
    cast = evaluate(linear_logprob, batch.to(dtype), upstream, trained=trained, backend=backend)

    def inside(*arguments, **options):
        with torch.autocast("cpu", dtype):
            return linear_logprob(*arguments, **options)

    found = evaluate(inside, batch, upstream, trained=trained, backend=backend)
    assert found["logp"].dtype == torch.float32
    for name, value in found.items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, cast[name].float()), name


def test_autocast_mends_mixed_dtypes(backend):
    """A bfloat16 hidden state from the backbone against a float32 head is the usual case, and no error."""
    batch = random_batch((3, 5), 29, 12)
    low = batch.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_logprob(low.hidden, batch.weight, batch.labels, backend=backend)
    assert torch.equal(found, linear_logprob(low.hidden, low.weight, low.labels, backend=backend))


def test_autocast_leaves_float64_alone():
    batch = random_batch((3, 5), 29, 12, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(batch.hidden, batch.weight).dtype == torch.float64
        check_linear_logprob(linear_logprob, batch, backend="torch")


def test_autocast_disabled_still_checks_dtypes():
    batch = random_batch((3, 5), 29, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=False), pytest.raises((TypeError, ValueError), match="head"):
        linear_logprob(batch.hidden.bfloat16(), batch.weight, batch.labels)
