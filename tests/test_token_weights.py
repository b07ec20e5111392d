"""Per-token weights and per-pair inputs of fused_spo_loss, on every path, against eager float64 logits."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from spo_kernels import LMHead, Sparsity, fused_spo_loss, sequence_logps
from spo_kernels.losses import DPO, IPO, SPO, PairLogps
from spo_kernels.testing import TensorMeter, eager_logprob, random_batch

VOCAB, HIDDEN, WIDTH = 53, 12, 8
LENGTHS = [5, 3, 6, 4, 6, 2]  # responses of three pairs, chosen first
PAIRS = len(LENGTHS) // 2


@dataclass(frozen=True)
class Weighted:
    """An objective that uses everything that arrives per pair."""

    coupling = "pair"

    def __call__(self, pairs):
        margin = pairs.chosen / pairs.chosen_lengths - pairs.rejected / pairs.rejected_lengths
        return -pairs.input("scale", "Weighted") * F.logsigmoid(margin - pairs.input("offset", "Weighted"))


OBJECTIVES: dict[str, Callable] = {"dpo": DPO(beta=0.3), "spo": SPO(DPO(beta=0.3)), "inputs": Weighted()}
PATHS = ["packed", "factorised", "two_pass"]
PAIR_INPUTS = {"offset": torch.tensor([0.5, -1.0, 2.0]), "scale": torch.tensor([1.0, 0.25, 3.0])}


@dataclass
class Case:
    """Padded tensors of the policy and the reference; a two-token prompt before each response."""

    dtype: torch.dtype = torch.float64
    seed: int = 0

    def __post_init__(self):
        policy = random_batch((2 * PAIRS, WIDTH), VOCAB, HIDDEN, dtype=self.dtype, bias=True, seed=self.seed)
        reference = random_batch((2 * PAIRS, WIDTH), VOCAB, 7, dtype=self.dtype, bias=True, seed=self.seed + 1)
        place = torch.arange(WIDTH)
        response = (place >= 2) & (place < 2 + torch.tensor(LENGTHS)[:, None])
        self.labels = policy.labels.masked_fill(~response, -100)
        self.leaves = {"hidden": policy.hidden, "weight": policy.weight, "bias": policy.bias}
        self.reference = {"ref_hidden": reference.hidden, "ref_head": reference.head()}
        generator = torch.Generator().manual_seed(self.seed)
        self.weights = torch.randn(self.labels.shape, generator=generator)
        self.weights[0, 3] = self.weights[4, 2] = self.weights[4, 5] = 0.0
        self.weights[1] = 1.0
        self.weights[5] = 0.0  # a whole response

    def logp(self, labels=None, **options):
        """The policy's, from float64 logits."""
        head = LMHead(self.leaves["weight"], self.leaves["bias"])
        labels = self.labels if labels is None else labels
        return eager_logprob(self.leaves["hidden"], head, labels, dtype=torch.float64, shift=True, **options)

    def run(self, *, packed=False, upstream=-1.7, weights=None, ref_weights=None, **options):
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in self.leaves.items()}
        head = LMHead(leaves["weight"], leaves["bias"])
        arguments = {"hidden": leaves["hidden"], "head": head, "labels": self.labels} | self.reference
        arguments |= {"token_weights": weights, "ref_token_weights": ref_weights}
        if packed:
            arguments["cu_seqlens"] = torch.arange(0, 2 * PAIRS * WIDTH + 1, WIDTH)
            for name in ("hidden", "ref_hidden", "labels", "token_weights", "ref_token_weights"):
                if arguments.get(name) is not None:
                    arguments[name] = arguments[name].flatten(0, 1)
        loss, metrics = fused_spo_loss(**arguments, pair_inputs=PAIR_INPUTS, shift=True, **options)
        (upstream * loss).sum().backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves.values())], metrics

    def eager(self, objective, *, upstream=-1.7, weights=None, ref_weights=None, reduction="mean", dtype=torch.float64):
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.leaves.items()}

        def sums(hidden, head, weights):
            logp = eager_logprob(hidden, head, self.labels, dtype=dtype, shift=True)
            return (logp * (1.0 if weights is None else weights.to(dtype))).sum(-1).chunk(2)

        lengths = torch.tensor(LENGTHS).chunk(2)
        reference = sums(*self.reference.values(), weights if ref_weights is None else ref_weights)
        inputs = {name: value.to(dtype) for name, value in PAIR_INPUTS.items()}
        policy = sums(leaves["hidden"], LMHead(leaves["weight"], leaves["bias"]), weights)
        losses = objective(PairLogps(*policy, *reference, *lengths, inputs=inputs))
        loss = {"mean": losses.mean, "sum": losses.sum, "none": lambda: losses}[reduction]()
        (upstream * loss).sum().backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves.values())]


def assert_near(found, truth, rough=None):
    """float64 to 1e-12; float32 within twice the error of eager float32, plus four roundings of the largest element."""
    for name, value, exact in zip(("loss", "hidden", "weight", "bias"), found, truth, strict=True):
        scale = exact.abs().max()
        error = (value.double() - exact).abs().max()
        if rough is None:
            assert error <= 1e-12 * scale, (name, error.item())
            continue
        eager = (rough[("loss", "hidden", "weight", "bias").index(name)].double() - exact).abs().max()
        assert error <= 2 * eager + 4 * torch.finfo(torch.float32).eps * scale, (name, error.item(), eager.item())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_in_every_path(name, path, packed):
    case, objective = Case(), OBJECTIVES[name]
    for weights in (case.weights, case.weights.abs() + 0.1):
        found, _ = case.run(loss=objective, path=path, weights=weights, packed=packed, backend="torch")
        assert_near(found, case.eager(objective, weights=weights))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_in_float32(backend, name, path):
    case, objective = Case(torch.float32), OBJECTIVES[name]
    found, _ = case.run(loss=objective, path=path, weights=case.weights, backend=backend)
    exact, rough = (
        case.eager(objective, weights=case.weights, dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    assert_near(found, exact, rough)


@pytest.mark.parametrize("path", ["packed", "factorised"])
def test_several_tiles(path):
    """A workspace that splits pairs into groups, and sequences into tiles."""
    case, objective = Case(), OBJECTIVES["spo"]
    accumulators = {"packed": 0, "factorised": 2}[path]
    workspace = accumulators * VOCAB * HIDDEN * 8 + {"packed": 9, "factorised": 2}[path] * (VOCAB * 11 + HIDDEN * 16)
    options = dict(loss=objective, weights=case.weights, backend="torch", workspace_bytes=workspace)
    found, _ = case.run(path=path, **options)
    assert_near(found, case.eager(objective, weights=case.weights))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_any_upstream(reduction, packed):
    case, objective = Case(), OBJECTIVES["spo"]
    upstream = torch.tensor([0.3, -2.0, 0.0], dtype=torch.float64) if reduction == "none" else 0.4
    options = dict(weights=case.weights, reduction=reduction, upstream=upstream)
    found, _ = case.run(loss=objective, packed=packed, backend="torch", **options)
    assert_near(found, case.eager(objective, **options))


@pytest.mark.parametrize("path", PATHS)
def test_the_reference_can_weigh_otherwise(path):
    case, objective, other = Case(), OBJECTIVES["dpo"], Case(seed=5).weights
    found, _ = case.run(loss=objective, path=path, weights=case.weights, ref_weights=other, backend="torch")
    assert_near(found, case.eager(objective, weights=case.weights, ref_weights=other))
    found, _ = case.run(loss=objective, path=path, ref_weights=other, backend="torch")
    assert_near(found, case.eager(objective, ref_weights=other))


@pytest.mark.parametrize("path", PATHS)
def test_weights_of_one_change_nothing(backend, path):
    """Of an objective that no backend has a kernel for: such a kernel rounds otherwise, and knows no weights."""
    case = Case(torch.float32)
    options = dict(path=path, backend=backend, token_metrics=True, loss=IPO())
    plain, plain_metrics = case.run(**options)
    found, metrics = case.run(**options, weights=torch.ones(case.labels.shape))
    assert all(torch.equal(*both) for both in zip(found, plain, strict=True))
    assert all(torch.equal(metrics[name], plain_metrics[name]) for name in plain_metrics)


@pytest.mark.parametrize("path", PATHS)
def test_a_weight_of_zero_is_the_limit_of_a_small_one(path):
    """Lengths do not jump where a weight reaches zero; entropy is of the tokens that take part."""
    case = Case()
    weights, small = case.weights.abs() + 0.5, case.weights.abs() + 0.5
    weights[:, 4], small[:, 4] = 0.0, 1e-14
    options = dict(loss=Weighted(), path=path, backend="torch")
    found, expected = (case.run(weights=values, **options)[0] for values in (weights, small))
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-12)
    kept = case.labels.masked_fill(weights == 0, -100)
    kept[:, 0] = -100
    _, extras = case.logp(kept, outputs=("entropy",))
    _, metrics = case.run(weights=weights, token_metrics=True, **options)
    expected_entropy = extras["entropy"].sum() / (kept != -100).sum()
    torch.testing.assert_close(metrics["entropy"].double(), expected_entropy, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("path", "products"), [("packed", 3), ("factorised", 3), ("two_pass", 4)])
def test_weightless_tokens_cost_nothing(path, products):
    case = Case()
    case.reference = {"ref_logps": torch.zeros(2 * PAIRS)}
    taking_part = int(((case.labels != -100) & (case.weights != 0)).sum())
    with TensorMeter() as meter:
        options = dict(path=path, packed=False, weights=case.weights, backend="torch")
        case.run(loss="dpo", **options)
    assert meter.flops == products * 2 * taking_part * VOCAB * HIDDEN


@pytest.mark.parametrize("path", PATHS)
def test_nothing_weighs_anything(backend, path):
    case = Case(torch.float32)
    found, metrics = case.run(loss="dpo", path=path, weights=torch.zeros(case.labels.shape), backend=backend)
    assert torch.isclose(found[0], torch.tensor(2.0).log())
    assert all(not grad.any() for grad in found[1:]) and all(value.isfinite() for value in metrics.values())


def test_metrics_hold_weighted_sums(backend):
    case = Case(torch.float32)
    _, metrics = case.run(loss="dpo", weights=case.weights, backend=backend)
    logp = case.logp() * case.weights
    torch.testing.assert_close(metrics["logps/chosen"].double(), logp.sum(-1)[:PAIRS].mean(), rtol=1e-5, atol=1e-5)


def test_weights_and_inputs_are_constants():
    case = Case()
    weights = case.weights.clone().requires_grad_()
    inputs = {name: value.clone().requires_grad_() for name, value in PAIR_INPUTS.items()}
    loss, _ = fused_spo_loss(
        case.leaves["hidden"].requires_grad_(),
        case.leaves["weight"],
        case.labels,
        loss=Weighted(),
        token_weights=weights,
        pair_inputs=inputs,
    )
    loss.backward()
    assert weights.grad is None and all(value.grad is None for value in inputs.values())


def test_a_sparse_backward_is_weighted_too():
    """Certified at a tolerance that drops nothing: the exact gradients."""
    case = Case()
    options = dict(loss="dpo", weights=case.weights, backend="torch")
    found, metrics = case.run(sparsity=Sparsity("certified", tolerance=1e-12), **options)
    assert_near(found, case.eager(DPO(), weights=case.weights))
    assert "sparsity/kept" in metrics


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_sequence_logps(backend, packed):
    case = Case(torch.float32)
    logp = case.logp()
    hidden, labels, weights, options = case.leaves["hidden"].clone().requires_grad_(), case.labels, case.weights, {}
    if packed:
        options["cu_seqlens"] = torch.arange(0, 2 * PAIRS * WIDTH + 1, WIDTH)
        labels, weights = labels.flatten(), weights.flatten()
    states = hidden.flatten(0, 1) if packed else hidden
    options |= dict(shift=True, backend=backend)
    head = LMHead(case.leaves["weight"], case.leaves["bias"])
    sums = sequence_logps(states, head, labels, token_weights=weights, **options)
    torch.testing.assert_close(sums.double(), (logp * case.weights).sum(-1), rtol=1e-5, atol=1e-5)
    sums.sum().backward()
    assert not hidden.grad[5].any() and hidden.grad[1].any()


@pytest.mark.parametrize("path", PATHS)
def test_memory(path):
    """No [N, V] where the workspace forbids it, weights or not."""
    tokens, vocab, width = 512, 4096, 32
    batch = random_batch((4, tokens // 4), vocab, width)
    leaves = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    workspace = {"packed": 7 << 20, "factorised": 2 << 20, "two_pass": 1 << 20}[path]
    with TensorMeter() as meter:
        loss, _ = fused_spo_loss(
            *leaves,
            batch.labels,
            ref_logps=torch.zeros(4),
            token_weights=torch.rand(4, tokens // 4),
            path=path,
            workspace_bytes=workspace,
            backend="torch",
            loss="dpo",
        )
        loss.backward()
    assert meter.largest < tokens * vocab * 4 * 0.6
    assert meter.peak <= workspace + batch.weight.nbytes + 4 * batch.hidden.nbytes + (64 << 10)


def test_compile_fullgraph():
    case = Case(torch.float32)
    arguments = dict(
        labels=case.labels,
        ref_logps=torch.linspace(-30, -20, 2 * PAIRS),
        token_weights=case.weights,
        pair_inputs=PAIR_INPUTS,
        loss=Weighted(),
        shift=True,
        backend="torch",
    )

    def run(function):
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in case.leaves.items()}
        loss, metrics = function(leaves["hidden"], LMHead(leaves["weight"], leaves["bias"]), **arguments)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves.values()), *metrics.values()]

    compiled = run(torch.compile(fused_spo_loss, backend="aot_eager", fullgraph=True))
    for found, expected in zip(compiled, run(fused_spo_loss), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def elsewhere(*shape):
    """On a device that the other arguments are not on."""
    with FakeTensorMode():
        return torch.ones(*shape, device="cuda")


WRONG = {
    "weights-list": (dict(token_weights=[1.0]), TypeError, "token_weights must be a torch.Tensor, got list"),
    "weights-shape": (
        dict(token_weights=torch.ones(3)),
        ValueError,
        r"token_weights must have labels' shape \[6, 8\], got \[3\]",
    ),
    "weights-dtype": (
        dict(token_weights=torch.ones(6, 8, dtype=torch.int64)),
        TypeError,
        "token_weights must be floating point, got torch.int64",
    ),
    "weights-device": (dict(token_weights=elsewhere(6, 8)), ValueError, "token_weights is on cuda:0"),
    "weights-nan": (
        dict(token_weights=torch.ones(6, 8).index_fill(1, torch.tensor([2]), torch.nan)),
        ValueError,
        r"token_weights must be finite, got token_weights\[0, 2\] = nan",
    ),
    "weights-infinite": (dict(token_weights=torch.full((6, 8), torch.inf)), ValueError, "must be finite.* = inf"),
    "ref-weights-shape": (
        dict(ref_token_weights=torch.ones(3)),
        ValueError,
        r"ref_token_weights must have labels' shape \[6, 8\], got \[3\]",
    ),
    "ref-weights-with-sums": (
        dict(ref_token_weights=torch.ones(6, 8), ref_hidden=None, ref_head=None, ref_logps=torch.ones(6)),
        ValueError,
        "ref_token_weights needs ref_hidden and ref_head, or ref_logps of tokens in labels' shape: these are summed",
    ),
    "ref-weights-alone": (
        dict(ref_token_weights=torch.ones(6, 8), ref_hidden=None, ref_head=None),
        ValueError,
        "ref_token_weights needs ref_hidden and ref_head",
    ),
    "inputs-list": (dict(pair_inputs=[1.0]), TypeError, "pair_inputs must map names to tensors, got list"),
    "inputs-number": (
        dict(pair_inputs={"offset": 1.0}),
        TypeError,
        r"pair_inputs\['offset'\] must be a torch.Tensor, got float",
    ),
    "inputs-shape": (
        dict(pair_inputs={"offset": torch.ones(6)}),
        ValueError,
        r"pair_inputs\['offset'\] must have shape \[3\], got \[6\]",
    ),
    "inputs-dtype": (
        dict(pair_inputs={"offset": torch.ones(3, dtype=torch.bool)}),
        TypeError,
        r"pair_inputs\['offset'\] must be floating point, got torch.bool",
    ),
    "inputs-device": (
        dict(pair_inputs={"offset": elsewhere(3)}),
        ValueError,
        r"pair_inputs\['offset'\] is on cuda:0",
    ),
    "inputs-missing": (dict(loss=Weighted()), ValueError, r"Weighted needs pair_inputs\['scale'\]"),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_bad_input(changes, error, message):
    case = Case()
    with pytest.raises(error, match=message):
        head = LMHead(case.leaves["weight"], case.leaves["bias"])
        fused_spo_loss(case.leaves["hidden"], head, case.labels, shift=True, **(case.reference | changes))
