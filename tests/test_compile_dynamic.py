"""torch.compile with symbolic sizes and with a head whose scale changes from call to call."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from spo_kernels import LMHead, fused_spo_loss, linear_logprob

WIDTH, VOCAB = 12, 29
COMPILERS = ["eager", "aot_eager"]
# what its AOT backends do with numbers: begin anew once, and take one that a graph computes for a constant
TORCH_2_11 = torch.__version__.startswith("2.11.")
# enough that a graph for each would be more than two
TEMPERATURES = [0.5 + 0.125 * i for i in range(5)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def make(rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows * tokens)
    hidden, weight = torch.randn(rows, tokens, WIDTH), torch.randn(VOCAB, WIDTH)
    labels = torch.randint(VOCAB, (rows, tokens))
    labels[0, :2] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def gradients(result: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result and what its sum sends back."""
    return result.detach(), *torch.autograd.grad(result.sum(), (hidden, weight))


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_linear_logprob_with_symbolic_sizes(backend: str, compiler: str) -> None:
    """One graph for every number of rows and tokens, forward and backward."""
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(linear_logprob, backend=counter, fullgraph=True, dynamic=True)
    for rows, tokens in ((3, 5), (4, 7), (2, 9)):
        hidden, weight, labels = make(rows, tokens)
        found = gradients(compiled(hidden, weight, labels, backend=backend), hidden, weight)
        assert_same(found, gradients(linear_logprob(hidden, weight, labels, backend=backend), hidden, weight))
    assert counter.frame_count == 1 + (TORCH_2_11 and compiler == "aot_eager")


def test_the_loss_with_symbolic_sizes(backend: str) -> None:
    """One graph for every number of tokens and pairs, which may begin anew once for the loss's numbers."""
    counter = CompileCounterWithBackend("aot_eager")

    def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        return fused_spo_loss(hidden, weight, labels, loss="dpo", ref_logps=reference, backend=backend)[0]

    compiled = torch.compile(loss_of, backend=counter, fullgraph=True, dynamic=True)
    for rows, tokens in ((4, 5), (4, 7), (6, 3), (6, 4)):
        hidden, weight, labels = make(rows, tokens)
        given = (hidden, weight, labels, torch.arange(float(rows)) - 20)
        assert_same(gradients(compiled(*given), hidden, weight), gradients(loss_of(*given), hidden, weight))
    assert counter.frame_count <= 2


def test_numbers_of_pairs_beside_symbolic_sizes() -> None:
    """After calls with other sizes those of hidden and labels are symbolic, and those of pairs may be known."""

    def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor, reference: Tensor, offset: Tensor) -> Tensor:
        inputs = {"offset": offset}
        return fused_spo_loss(hidden, weight, labels, loss="odpo", ref_logps=reference, pair_inputs=inputs)[0]

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    hidden, weight, labels = make(6, 5)
    given = (hidden, weight, labels, torch.arange(6.0) - 20, torch.arange(3.0))
    torch._dynamo.maybe_mark_dynamic(hidden, 0)
    torch._dynamo.maybe_mark_dynamic(labels, 0)
    assert_same(gradients(compiled(*given), hidden, weight), gradients(loss_of(*given), hidden, weight))


def inside(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return linear_logprob(hidden, LMHead(weight, logit_scale=1 / temperature), labels)


def given(hidden: Tensor, head: LMHead, labels: Tensor) -> Tensor:
    return linear_logprob(hidden, head, labels)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("built", ["inside", "outside"])
def test_a_changing_scale_costs_two_graphs(built: str, dynamic: bool | None) -> None:
    """One for the first value, and one for a symbolic one."""
    if TORCH_2_11 and built == "inside":
        pytest.skip("torch 2.11 compiles anew for each scale that is computed inside")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(inside if built == "inside" else given, backend=counter, fullgraph=True, dynamic=dynamic)
    hidden, weight, labels = make(3, 5)
    for temperature in TEMPERATURES:
        if built == "inside":
            result = compiled(hidden, weight, labels, temperature)
        else:
            result = compiled(hidden, LMHead(weight, logit_scale=1 / temperature), labels)
        expected = gradients(inside(hidden, weight, labels, temperature), hidden, weight)
        assert_same(gradients(result, hidden, weight), expected)
    assert counter.frame_count <= 2


def test_a_changing_softcap_costs_two_graphs() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def capped(hidden: Tensor, weight: Tensor, labels: Tensor, cap: float) -> Tensor:
        return linear_logprob(hidden, LMHead(weight, logit_softcap=cap), labels)

    compiled = torch.compile(capped, backend=counter, fullgraph=True)
    hidden, weight, labels = make(3, 5)
    for cap in TEMPERATURES:
        expected = gradients(capped(hidden, weight, labels, 10 * cap), hidden, weight)
        assert_same(gradients(compiled(hidden, weight, labels, 10 * cap), hidden, weight), expected)
    assert counter.frame_count <= 2
