"""The sparse backward: what it promises, token by token, and what it costs.

With an identity for a head, hidden states are logits and hidden's gradient is the logits' gradient: every entry that
was left out is seen as an exact zero.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_kernels import Sparsity, fused_spo_loss, linear_logprob
from spo_kernels.backends.cpp_products import NativeProducts
from spo_kernels.backends.products import VendorProducts
from spo_kernels.engine.workspace import _MAX_CODE_BYTES, block_width
from spo_kernels.testing import evaluate, random_batch, random_upstream

BLOCK = 128
MODES = ("certified", "unbiased")


def zipf_logits(tokens, vocab, seed=0, spread=1.0, slope=1.6):
    """Like a language model's: falling with the id, with noise and one outstanding token."""
    generator = torch.Generator().manual_seed(seed)
    prior = -slope * torch.log1p(torch.arange(vocab) / 4.0)
    logits = prior + spread * torch.randn(tokens, vocab, generator=generator)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    logits[torch.arange(tokens), labels] += 6.0
    return logits, labels


def logit_gradient(logits, labels, upstream, sparsity, **options):
    """d Σ upstream * logp by the logits, through an identity head, and the choice's figures."""
    hidden = logits.clone().requires_grad_()
    head = torch.eye(logits.shape[1], dtype=logits.dtype)
    names = ("dropped_mass", "kept_share")
    logp, extras = linear_logprob(hidden, head, labels, sparsity=sparsity, outputs=names, **options)
    (logp * upstream).sum().backward()
    return hidden.grad, logp.detach(), extras


def exact_gradient(logits, labels, upstream):
    p = logits.double().softmax(-1)
    onehot = torch.nn.functional.one_hot(labels, logits.shape[1])
    return upstream.double()[:, None] * (onehot - p), p


def by_block(values):
    """`[tokens, V]` to sums over blocks."""
    return torch.stack([piece.sum(1) for piece in values.split(BLOCK, 1)], 1)


def check_certificate(logits, labels, upstream, tolerance, **options):
    found, _, extras = logit_gradient(logits, labels, upstream, Sparsity("certified", tolerance), **options)
    expected, p = exact_gradient(logits, labels, upstream)
    # a block that was left out is zero where its softmax is not; blocks of probability 0 cannot be told apart
    left_out = (found == 0) & (expected != 0)
    whole = by_block((found != 0).double()) == 0
    kept = torch.repeat_interleave(~whole, BLOCK, 1)[:, : p.shape[1]]
    wide = logits.double().abs().amax(1, keepdim=True) * 2.0**-22 + 2.0**-20  # of float32 logits and exponentials
    error = ((found.double() - expected).abs() * kept).div(upstream.abs()[:, None] + 1e-30)
    at_label = torch.nn.functional.one_hot(labels, p.shape[1]) * 2.0**-23
    assert (error <= wide * p + at_label + 1e-9).all(), "a kept entry is not the exact one"
    dropped = (p * left_out).sum(1)
    assert (dropped <= tolerance).all(), f"dropped {dropped.max():.3g}, tolerance {tolerance:.3g}"
    torch.testing.assert_close(extras["dropped_mass"].double(), dropped, rtol=2e-3, atol=1e-6)
    l1 = (found.double() - expected).abs().sum(1)
    rounding = upstream.abs() * ((wide * p).sum(1) + 1e-6)
    assert (l1 <= upstream.abs() * tolerance + rounding).all()
    assert (kept[torch.arange(len(labels)), labels] | (upstream == 0)).all(), "a label's block was left out"
    return extras


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 40),
    vocab=st.sampled_from([128, 640, 1000, 1300]),
    spread=st.floats(0.0, 30.0),
    slope=st.floats(0.0, 4.0),
    exponent=st.integers(1, 16),
    workspace=st.sampled_from([None, 60_000, 400_000]),
)
def test_certificate(seed, tokens, vocab, spread, slope, exponent, workspace):
    logits, labels = zipf_logits(tokens, vocab, seed, spread, slope)
    upstream = torch.randn(tokens, generator=torch.Generator().manual_seed(seed))
    workspace = None if workspace is None else workspace + 12 * vocab * min(tokens, 4)
    check_certificate(logits, labels, upstream, 2.0**-exponent, workspace_bytes=workspace)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_something_is_left_out_and_no_value_changes(backend, dtype, mode):
    if backend == "cpp" and dtype == torch.float64:
        pytest.skip("cpp has no float64 tiles")
    logits, labels = zipf_logits(200, 1300)
    upstream = torch.linspace(-1.0, 1.0, 200)
    exact, logp, _ = logit_gradient(logits.to(dtype), labels, upstream, "exact", backend=backend)
    sparse, same, extras = logit_gradient(logits.to(dtype), labels, upstream, Sparsity(mode, 2**-6), backend=backend)
    assert torch.equal(logp, same)
    assert 0.0 < extras["kept_share"].mean() < 0.6 and extras["dropped_mass"].max() > 0
    assert not torch.equal(exact, sparse)
    error = (exact.double() - sparse.double()).norm() / exact.double().norm()
    assert error < 0.05


def test_exact_is_what_it_is_without_the_argument(backend):
    batch = random_batch((3, 50), 400, 24, bias=True, ignored=0.3)
    upstream = random_upstream(batch, ())
    plain = evaluate(linear_logprob, batch, upstream, backend=backend)
    exact = evaluate(linear_logprob, batch, upstream, backend=backend, sparsity="exact")
    for name, value in plain.items():
        assert torch.equal(value, exact[name]), name


HEADS = {"trained": ("hidden", "weight", "bias"), "frozen": ("hidden",), "head only": ("weight", "bias")}


@pytest.mark.parametrize("trained", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("mode", MODES)
def test_a_small_tolerance_gives_the_exact_gradients(backend, mode, trained):
    """Every gradient and option, tokens ignored and shifted: only what float32 cannot see is left out."""
    batch = random_batch((4, 60), 900, 40, bias=True, ignored=0.4)
    batch.weight.mul_(torch.exp(-torch.arange(900) / 300.0)[:, None])
    batch.bias.sub_(torch.arange(900) / 12.0)
    outputs = ("lse", "entropy", "log_sum_p2")
    upstream = random_upstream(batch, outputs)
    options = dict(outputs=outputs, logit_scale=0.8, logit_softcap=60.0, shift=True, trained=trained, backend=backend)
    exact = evaluate(linear_logprob, batch, upstream, **options)
    sparse = evaluate(linear_logprob, batch, upstream, sparsity=Sparsity(mode, 1e-9), **options)
    head = batch.head(logit_scale=0.8, logit_softcap=60.0)
    figures = linear_logprob(
        batch.hidden.requires_grad_(), head, batch.labels, sparsity=Sparsity(mode, 1e-9),
        shift=True, outputs=("kept_share",), backend=backend,
    )[1]  # fmt: skip
    assert 0.0 < figures["kept_share"].amax() < 0.9
    for name, value in exact.items():
        torch.testing.assert_close(sparse[name], value, rtol=2e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_hidden_gradient_bound(backend):
    """|c| τ times the largest row of the weight, through a head that is not the identity."""
    torch.manual_seed(0)
    tolerance = 2.0**-5
    head = torch.randn(1300, 96) / 30
    hidden = 40.0 * torch.randn(64, 96)
    p = (hidden.double() @ head.double().t()).softmax(-1)
    labels = p.argmax(1)
    upstream = torch.randn(64)
    grads = []
    for sparsity in ("exact", Sparsity("certified", tolerance)):
        leaf = hidden.clone().requires_grad_()
        logp, extras = linear_logprob(
            leaf, head, labels, sparsity=sparsity, backend=backend, outputs=("dropped_mass", "kept_share")
        )
        (logp * upstream).sum().backward()
        grads.append(leaf.grad.double())
    assert extras["dropped_mass"].max() > tolerance / 8
    bound = upstream.abs() * tolerance * head.norm(dim=1).max()
    assert ((grads[0] - grads[1]).norm(dim=1) <= bound + 1e-6).all()


def test_unbiased():
    """Mean over seeds, entry by entry, within 4 standard errors; squared error within the stated variance.

    The standard error is that of `p / q` drawn with probability `q = min(1, mass / tolerance)`. Where fewer than 10
    draws are expected, it says little: their mean is not normal.
    """
    tokens, vocab, tolerance, seeds = 6, 1280, 2.0**-4, 600
    logits, labels = zipf_logits(tokens, vocab, slope=1.3)
    upstream = torch.tensor([1.0, -2.0, 0.5, 1.0, 1.0, 3.0])
    expected, p = exact_gradient(logits, labels, upstream)
    total, loss = torch.zeros_like(expected), torch.zeros(tokens).double()
    shares = []
    for seed in range(seeds):
        found, _, extras = logit_gradient(logits, labels, upstream, Sparsity("unbiased", tolerance, seed))
        shares.append(extras["kept_share"])
        total += found
        loss += (found - expected).square().sum(1)
    mass = by_block(p)
    probability = (mass / tolerance).clamp_max(1.0)
    probability.scatter_(1, labels[:, None] // BLOCK, 1.0)
    drawn = probability.repeat_interleave(BLOCK, 1)
    allowed = 4.0 * expected.abs() * ((1.0 / drawn - 1.0) / seeds).sqrt() + 1e-6
    often = drawn * seeds >= 10.0
    assert ((total / seeds - expected).abs() <= allowed)[often].all()
    # most entries are tested, and most of those are drawn, not kept for sure
    assert often.double().mean() > 0.8 and (often & (drawn < 1.0)).double().mean() > 0.5
    tail = (mass * (mass < tolerance)).sum(1)
    assert (loss / seeds <= 1.15 * upstream.double().square() * tolerance * tail + 1e-9).all()
    assert torch.stack(shares).mean() < 0.7


def test_seeds():
    """The same seed makes the same choice, whatever the tiles; another makes another one."""
    logits, labels = zipf_logits(300, 1280, slope=1.4)
    upstream = torch.ones(300)

    def choice(seed, **options):
        return logit_gradient(logits, labels, upstream, Sparsity("unbiased", 2**-3, seed), **options)[0] != 0

    first = choice(7)
    assert torch.equal(first, choice(7))
    assert torch.equal(first, choice(7, workspace_bytes=1 << 20))
    for other in (8, 7 + 2**32, 2**63 - 1):
        assert not torch.equal(first, choice(other))


def test_flat_logits_run_exactly(backend):
    """Nearly everything would be kept: nothing is left out then, trained or frozen."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(128, 16), 0.01 * torch.randn(2000, 16)
    labels = torch.randint(2000, (128,))
    for trained in (True, False):
        results = []
        for sparsity in ("exact", Sparsity("certified", 2**-8)):
            leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
            logp, extras = linear_logprob(
                *leaves, labels, sparsity=sparsity, backend=backend, outputs=("dropped_mass", "kept_share")
            )
            logp.sum().backward()
            results.append(leaves)
        assert (extras["kept_share"] == 1).all() and (extras["dropped_mass"] == 0).all()
        torch.testing.assert_close(results[0][0].grad, results[1][0].grad, rtol=1e-5, atol=1e-6)
        if trained:
            assert torch.equal(results[0][1].grad, results[1][1].grad)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_products_are_counted(backend, monkeypatch, trained):
    """1 + 3ρ products, 1 + 2ρ with a frozen head and what the look before costs there."""
    counted, running = [], []
    for kind in (VendorProducts, NativeProducts):

        def matmul(self, a, b, out, *, _original=kind.matmul, accumulate=False, **lists):
            if not running:  # a product may call another one
                rows = a.shape[0] if lists.get("a_rows") is None else lists["a_rows"].numel()
                counted.append(rows * a.shape[1] * b.shape[1])
            running.append(None)
            _original(self, a, b, out, accumulate=accumulate, **lists)
            running.pop()

        monkeypatch.setattr(kind, "matmul", matmul)
    logits, labels = zipf_logits(320, 1280, slope=3.0)
    hidden = logits.requires_grad_()
    weight = torch.eye(1280).requires_grad_(trained)
    logp, extras = linear_logprob(
        hidden, weight, labels, sparsity="certified", outputs=("kept_share",), backend=backend
    )
    logp.sum().backward()
    share = extras["kept_share"].mean().item()
    products = sum(counted) / (320 * 1280 * 1280)
    looking = 0.0 if trained else 1 / 32
    assert share < 0.5
    assert products == pytest.approx(1.0 + (3 if trained else 2) * share + looking, rel=1e-4)


@pytest.mark.parametrize(("tokens", "vocab"), [(65_536, 128_256), (2048, 32_768), (1, 1), (10**6, 256_000), (3, 10**7)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_choice_is_small(tokens, vocab, device):
    """One byte a (token, block) pair; block masses are those of one row of tiles."""
    width = block_width(tokens, vocab, device)
    assert width % BLOCK == 0
    assert tokens * -(-vocab // width) <= _MAX_CODE_BYTES or width >= vocab


@pytest.mark.parametrize("labels", ["none", "all ignored", "one"])
def test_few_tokens(backend, labels):
    tokens = {"none": 0, "all ignored": 5, "one": 1}[labels]
    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = (5.0 * torch.randn(300, 8)).requires_grad_()
    targets = torch.full((tokens,), -100 if labels == "all ignored" else 3)
    logp, extras = linear_logprob(
        hidden, weight, targets, sparsity="certified", outputs=("dropped_mass", "kept_share"), backend=backend
    )
    assert logp.shape == extras["dropped_mass"].shape == extras["kept_share"].shape == (tokens,)
    logp.sum().backward()
    if labels != "one":
        assert not weight.grad.any() and not hidden.grad.any()


def test_a_workspace_below_a_block_runs_exactly():
    hidden, weight = torch.randn(4, 64, requires_grad=True), 9.0 * torch.randn(400, 64)
    labels = torch.tensor([1, 2, 3, 4])
    extras = linear_logprob(
        hidden, weight, labels, sparsity="certified", workspace_bytes=20_000, outputs=("kept_share",)
    )[1]
    assert (extras["kept_share"] == 1).all()


def test_non_finite_hidden_states_show(backend):
    logits, labels = zipf_logits(40, 640)
    logits[3, 7] = torch.nan
    grad, logp, _ = logit_gradient(logits, labels, torch.ones(40), "certified", backend=backend)
    assert logp[3].isnan() and grad[3].isnan().any()
    assert grad[torch.arange(40) != 3].isfinite().all()


def test_without_gradients_nothing_is_chosen():
    logits, labels = zipf_logits(20, 640)
    with torch.no_grad():
        _, extras = linear_logprob(
            logits, torch.eye(640), labels, sparsity="certified", outputs=("dropped_mass", "kept_share")
        )
    assert (extras["kept_share"] == 1).all() and (extras["dropped_mass"] == 0).all()


WRONG = {
    "name": (dict(sparsity="sparse"), ValueError, "sparsity mode must be one of 'exact'"),
    "type": (dict(sparsity=0.5), TypeError, "sparsity must be one of 'exact'"),
    "path": (dict(sparsity="certified", path="packed"), ValueError, "a sparse backward takes two passes"),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG)
def test_bad_arguments(options, error, message):
    hidden, weight = torch.randn(2, 6, 8), torch.randn(200, 8, requires_grad=True)
    labels = torch.randint(200, (2, 6))
    with pytest.raises(error, match=message):
        fused_spo_loss(hidden, weight, labels, ref_logps=torch.zeros(2), **options)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1.0, float("nan"), "small", True])
def test_bad_tolerance(tolerance):
    with pytest.raises(ValueError, match=r"tolerance must be a number in \(0, 1\)"):
        Sparsity("certified", tolerance)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="seed must be a whole number"):
        Sparsity("unbiased", seed=seed)


@pytest.mark.parametrize("mode", MODES)
def test_loss(backend, mode):
    """`fused_spo_loss` reports what is left out, and its gradient is near the exact one."""
    logits, labels = zipf_logits(240, 1280)
    grads = []
    for sparsity in ("exact", Sparsity(mode, 2**-5)):
        hidden = logits.view(4, 60, 1280).clone().requires_grad_()
        head = torch.eye(1280).requires_grad_()
        loss, metrics = fused_spo_loss(
            hidden,
            head,
            labels.view(4, 60),
            ref_logps=torch.tensor([-300.0, -310.0, -290.0, -295.0]),
            sparsity=sparsity,
            backend=backend,
        )
        loss.backward()
        grads.append((hidden.grad, head.grad))
    assert metrics["sparsity/kept"] < 0.6
    assert 0 < metrics["sparsity/dropped_mass_mean"] <= metrics["sparsity/dropped_mass_max"]
    if mode == "certified":
        assert metrics["sparsity/dropped_mass_max"] <= 2**-5
    for exact, sparse in zip(*grads, strict=True):
        assert (exact - sparse).norm() < 0.05 * exact.norm()


def test_compile_fullgraph(backend):
    torch._dynamo.reset()
    logits, labels = zipf_logits(64, 640)

    def run(function):
        hidden = logits.clone().requires_grad_()
        logp, extras = function(
            hidden, torch.eye(640), labels, sparsity="certified", outputs=("kept_share",), backend=backend
        )
        logp.sum().backward()
        return logp.detach(), hidden.grad, extras["kept_share"]

    compiled = run(torch.compile(linear_logprob, backend="aot_eager", fullgraph=True))
    for found, expected in zip(compiled, run(linear_logprob), strict=True):
        assert torch.equal(found, expected)
