"""The tile kernels of both GPU backends against float64, operand by operand.

Blocks are small, so that loops and ragged ends are met with little data: a program and step costs about 1 ms here.
"""

import mmap
import os

import pytest
import torch
from tile_inputs import PLAIN, ROWS, TRANSFORMS, close, logits64, made

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from spo_kernels.backends import registry
from spo_kernels.backends.contract import MASS_BLOCK, LogitTransform, Tile, TokenGrads, TokenStats

# unroll, lanes and warps of the Triton kernels
SMALL = (2, 32, 1)
each_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)

# ---- tile_stats


def expected_stats(logits, label_logit):
    """What TokenStats holds after all these logits."""
    m = logits.amax(1)
    shifted = logits - m[:, None]
    e = shifted.exp()
    moment = torch.where(e == 0, 0.0, e * shifted)
    return TokenStats(m, e.sum(1), label_logit, moment.sum(1), e.square().sum(1))


@each_transform
@pytest.mark.parametrize("moments", [False, True], ids=["logp", "moments"])
@pytest.mark.parametrize(("columns", "bias"), [(1, True), (64, False), (131, True)])
def test_stats_of_two_tiles(kernels, columns, bias, moments, transform):
    tiles = [made(columns, bias, seed) for seed in (1, 2)]
    stats = TokenStats.start(ROWS, tiles[0][0], moments)
    seen, label_logit = [], torch.full((ROWS,), -torch.inf, dtype=torch.float64)
    for step, (tile, values, labels) in enumerate(tiles):
        labels = labels if step == 0 else labels.flip(0)
        before = tile.clone()
        kernels.tile_stats(Tile(tile, labels, transform, values), stats, launch=SMALL)
        assert torch.equal(tile, before)
        logits = logits64(tile.double(), values, transform)
        seen.append(logits)
        inside = (labels >= 0) & (labels < columns)
        label_logit[inside] = logits[inside, labels[inside]]
    expected = expected_stats(torch.cat(seen, 1), label_logit)
    for name, value in vars(stats).items():
        if value is not None:
            close(value, getattr(expected, name), 1e-5)


@each_transform
@pytest.mark.parametrize(("launch", "moments"), [(None, False), (SMALL, False), (SMALL, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_exponentials(kernels, dtype, launch, moments, transform):
    """`rescale` and the operand, in place or in another dtype, after a first tile whose maximum may be larger."""
    columns = 131
    first, values, labels = made(columns, True, 1)
    tile, _, _ = made(columns, True, 2)
    stats = TokenStats.start(ROWS, tile, moments)
    kernels.tile_stats(Tile(first, labels, transform, values), stats)
    old = stats.max.clone()
    product = tile.double().requires_grad_()
    logits = logits64(product, values, transform)
    (slope,) = torch.autograd.grad(logits.sum(), product)
    rescale = torch.full((ROWS,), torch.nan)
    out = None if dtype == torch.float32 else torch.full(tile.shape, torch.nan, dtype=dtype)
    kernels.tile_stats(Tile(tile, labels, transform, values, out), stats, rescale=rescale, launch=launch)

    new = torch.maximum(old.double(), logits.detach().amax(1))
    expected = (logits.detach() - new[:, None]).exp() * slope.nan_to_num(0.0)
    inside = (labels >= 0) & (labels < columns)
    expected[inside, labels[inside]] = 0.0
    close(stats.max, new, 1e-6)
    close(rescale, (old.double() - new).exp(), 2e-6)
    close(tile if out is None else out, expected, 4e-6 if out is None else 6e-4)


def test_no_column_yet_but_minus_infinity(kernels):
    """exp(-inf + inf) must not appear."""
    tile = torch.full((ROWS, 40), -torch.inf)
    stats = TokenStats.start(ROWS, tile, True)
    rescale = torch.empty(ROWS)
    given = Tile(tile, torch.zeros(ROWS, dtype=torch.int64), PLAIN)
    kernels.tile_stats(given, stats, rescale=rescale, launch=SMALL)
    assert (stats.max == -torch.inf).all()
    for value in (stats.sum, stats.shifted_sum, stats.square_sum, rescale, tile):
        assert (value == 0).all()
    later, _, labels = made(40)
    kernels.tile_stats(Tile(later, labels, PLAIN), stats, launch=SMALL)
    close(stats.max + stats.sum.log(), later.double().logsumexp(1), 1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_logits_show(kernels, value):
    tile, _, labels = made(131)
    tile[3, 77] = value
    stats = TokenStats.start(ROWS, tile, True)
    kernels.tile_stats(Tile(tile, labels, PLAIN), stats, launch=SMALL)
    lse = stats.max + stats.sum.log()
    assert not lse[3].isfinite()
    assert lse[torch.arange(ROWS) != 3].isfinite().all()


@pytest.mark.parametrize("columns", [1, 127, 1300])
def test_block_masses(kernels, columns):
    tile, values, labels = made(columns, True)
    blocks = -(-columns // MASS_BLOCK)
    block_lse = torch.full((ROWS, blocks), torch.nan)
    stats = TokenStats.start(ROWS, tile, False)
    kernels.tile_stats(Tile(tile, labels, PLAIN, values), stats, block_lse=block_lse, launch=(2, 512, 4))
    logits = logits64(tile.double(), values, PLAIN)
    expected = torch.stack([piece.logsumexp(1) for piece in logits.split(MASS_BLOCK, 1)], 1)
    close(block_lse, expected)
    close(block_lse.double().logsumexp(1), stats.max.double() + stats.sum.double().log())


def test_label_logit_is_the_maximum_to_the_bit(kernels):
    """`correct` compares the two."""
    tile, _, _ = made(300, seed=3, spread=10.0)
    stats = TokenStats.start(ROWS, tile, False)
    kernels.tile_stats(Tile(tile, tile.argmax(1), LogitTransform(0.3, 2.0)), stats, launch=SMALL)
    assert torch.equal(stats.label_logit, stats.max)


# ---- tile_grad

FLOWS = [("logp",), ("lse",), ("entropy",), ("log_sum_p2",), ("logp", "lse", "entropy", "log_sum_p2")]


@each_transform
@pytest.mark.parametrize(
    ("columns", "dtype", "flows"),
    [*((131, torch.float32, flows) for flows in FLOWS), *((n, torch.float16, FLOWS[-1]) for n in (1, 7, 131))],
    ids=str,
)
def test_grad(kernels, columns, dtype, flows, transform):
    """Against float64 autograd, with a label in another tile and one that is ignored."""
    tile, values, labels = made(columns, columns > 1)
    product = tile.double().requires_grad_()
    logits = logits64(product, values, transform)
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    safe = log_p.masked_fill(p == 0, 0.0)
    inside = (labels >= 0) & (labels < columns)
    lse = logits.logsumexp(1)
    outputs = {
        # a label elsewhere moves this tile's logits only through the log-sum-exp
        "logp": torch.where(inside, logits.gather(1, labels.clamp(0, columns - 1)[:, None])[:, 0], 0.0) - lse,
        "lse": lse,
        "entropy": -(p * safe).sum(1),
        "log_sum_p2": (2 * log_p).logsumexp(1),
    }
    upstream = {name: torch.linspace(-1, 2, ROWS) + 0.3 * i for i, name in enumerate(flows)}
    loss = sum((upstream[name].double() * outputs[name]).sum() for name in flows)
    (expected,) = torch.autograd.grad(loss, product)
    found = {name: value.detach().float() for name, value in outputs.items()}
    grads = TokenGrads(
        lse_value=found["lse"] - 0.5,
        lse_rest=torch.full((ROWS,), 0.5),
        entropy_value=found["entropy"] if "entropy" in flows else None,
        log_sum_p2_value=found["log_sum_p2"] if "log_sum_p2" in flows else None,
        **upstream,
    )
    out = None if dtype == torch.float32 else torch.full(tile.shape, torch.nan, dtype=dtype)
    kernels.tile_grad(Tile(tile, labels, transform, values, out), grads, launch=SMALL)
    close(tile if out is None else out, expected.nan_to_num(0.0), 1e-5 if out is None else 2e-3)


def test_scale_rows_leaves_rows_of_factor_one(kernels):
    matrix = torch.randn(4, 70)
    matrix[0, 0] = torch.nan
    before, factors = matrix.clone(), torch.tensor([1.0, 0.5, 0.0, torch.nan])
    kernels.scale_rows(matrix, factors, launch=SMALL)
    assert torch.equal(matrix[0, 1:], before[0, 1:])
    assert torch.equal(matrix[1:3], before[1:3] * factors[1:3, None])
    assert matrix[3].isnan().all()


def test_scale_rows_in_half_precision(kernels):
    # the interpreter does not round to bfloat16 as a GPU does
    matrix = torch.randn(4, 80).half()[:, :70]
    factors = torch.tensor([1.0, 0.3, 0.0, -2.0])
    expected = (matrix.float() * factors[:, None]).half()
    kernels.scale_rows(matrix, factors, launch=SMALL)
    assert torch.equal(matrix, expected)


# ---- offsets beyond 2^31 elements


def test_rows_more_than_two_to_the_31_elements_apart(kernels):
    """A stride that fits 32 bits, with a row offset that does not, in memory that is reserved and hardly touched."""
    stride, rows, columns = 2**30 + 64, 3, 40
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        memory = mmap.mmap(-1, 4 * (stride * (rows - 1) + columns), flags=flags)
    except OSError as error:
        pytest.skip(f"cannot reserve 8 GiB of address space: {error}")
    tile = torch.frombuffer(memory, dtype=torch.float32).as_strided((rows, columns), (stride, 1))
    values = torch.randn(rows, columns)
    labels = torch.tensor([1, 2, 3])
    tile.copy_(values)
    stats = TokenStats.start(rows, values, False)
    kernels.tile_stats(Tile(tile, labels, PLAIN), stats, launch=SMALL)
    lse = (stats.max + stats.sum.log()).clone()
    close(lse, values.double().logsumexp(1))
    kernels.tile_grad(Tile(tile, labels, PLAIN), TokenGrads(lse, logp=torch.ones(rows)), launch=SMALL)
    expected = -values.double().softmax(1)
    expected[torch.arange(rows), labels] += 1.0
    close(tile, expected, 1e-6)
    kernels.scale_rows(tile, torch.full((rows,), 2.0), launch=SMALL)
    close(tile, 2 * expected, 1e-6)


# ---- the backend object


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"], indirect=True)
def test_out_receives_what_the_tile_would(backend):
    chosen = registry.load_backend(backend)
    tile, values, labels = made(40, True)
    grads = TokenGrads(lse_value=torch.full((ROWS,), 9.0), logp=torch.ones(ROWS))
    in_place, out = tile.clone(), torch.empty(tile.shape, dtype=torch.float16)
    chosen.tile_grad(Tile(in_place, labels, PLAIN, values), grads)
    chosen.tile_grad(Tile(tile, labels, PLAIN, values, out), grads)
    close(out, in_place, 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"products": torch.zeros(ROWS, 8, dtype=torch.float64)}, "float32"),
        ({"products": torch.zeros(8, ROWS).t()}, "contiguous rows"),
        ({"labels": torch.zeros(ROWS, dtype=torch.int32)}, "labels"),
        ({"bias": torch.zeros(9)}, "bias"),
        ({"out": torch.zeros(ROWS, 9)}, "out"),
    ],
)
def test_wrong_arguments_are_named(backend, change, message):
    fields = {"products": torch.zeros(ROWS, 8), "labels": torch.zeros(ROWS, dtype=torch.int64), "transform": PLAIN}
    grads = TokenGrads(lse_value=torch.zeros(ROWS), logp=torch.zeros(ROWS))
    with pytest.raises(ValueError, match=message):
        registry.load_backend(backend).tile_grad(Tile(**fields | change), grads)
