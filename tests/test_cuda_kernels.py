"""The CUDA kernels, emulated on the CPU and on a GPU, in every launch geometry against the torch tiles in float64.

What all GPU kernels are asked stands in tests/interpreted; this is what the CUDA ones could get wrong on their own:
which thread holds which column, ragged ends, unaligned rows, dtypes of tiles, barriers, and memory beyond a row.
"""

import ctypes
import mmap

import pytest
import torch
from emulated import BackendOnGpu, EmulatedBackend, emulated_module

from spo_kernels.backends import cuda_extension, registry
from spo_kernels.backends.contract import MASS_BLOCK, LogitTransform, Tile, TokenGrads, TokenStats, mass_blocks
from spo_kernels.backends.torch_backend import TorchBackend

# a warp per row up to 512; blocks of 128, 256 and 512 threads of 16 elements, once or several times over
WIDTHS = [1, 31, 32, 511, 512, 513, 516, 2047, 2048, 2049, 4096, 4100, 5376, 8191, 8192, 8193, 8200, 17001]
PLAIN, CAPPED = LogitTransform(), LogitTransform(-0.8, 20.0)
HALVES = [torch.bfloat16, torch.float16]
OPERANDS = [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
OPERANDS += [(half, None) for half in HALVES] + [(half, half) for half in HALVES]
each_operand = pytest.mark.parametrize(("dtype", "out_dtype"), OPERANDS, ids=str)


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def tiles(request):
    """The backend for CPU tensors."""
    if request.param == "emulated":
        return EmulatedBackend(emulated_module())
    module, detail = cuda_extension.load()
    if module is None:
        pytest.skip(detail)
    return BackendOnGpu(registry.load_backend("cuda"))


def made(rows, columns, dtype=torch.float32):
    """A tile, a bias with -inf in it, and labels at both ends, elsewhere and on both sides."""
    torch.manual_seed(columns)
    bias = torch.randn(columns)
    if columns > 3:
        bias[columns // 3] = -torch.inf
    labels = torch.tensor([0, columns - 1, -1, columns, columns // 2, 2**40])[:rows]
    return (3.0 * torch.randn(rows, columns)).to(dtype), bias, labels


def assert_near(actual, expected, size):
    """Within the rounding of float32 logits of size 60 and less, then of the result, both relative to `size`."""
    tolerance = 1e-5 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    error = (actual.double() - expected).abs() / (tolerance * size + smallest)
    worst = error.nan_to_num(torch.inf).max()
    assert worst <= 1.0, f"worst error {worst:.3g} times what is allowed"


def reference_stats(tile, bias, labels, transform, moments=True):
    stats = TokenStats.start(tile.shape[0], tile[:, :0].double(), moments)
    masses = torch.empty(tile.shape[0], mass_blocks(tile.shape[1]), dtype=torch.float64)
    TorchBackend().tile_stats(Tile(tile.double(), labels, transform, bias.double()), stats, block_lse=masses)
    return stats, masses


@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("columns", WIDTHS)
def test_stats_and_masses(tiles, columns, dtype, transform):
    """A half-precision tile is exact from its values on: its statistics are float32's."""
    tile, bias, labels = made(6, columns, dtype)
    before = tile.clone()
    stats = TokenStats.start(6, tile.float(), True)
    masses = torch.full((6, mass_blocks(columns)), torch.nan)
    tiles.tile_stats(Tile(tile, labels, transform, bias), stats, block_lse=masses)
    assert torch.equal(tile, before)
    expected, expected_masses = reference_stats(tile, bias, labels, transform)
    for name, value in vars(stats).items():
        value, truth = value.double(), getattr(expected, name)
        torch.testing.assert_close(value, truth, rtol=2e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(masses.double(), expected_masses, rtol=2e-6, atol=4e-6)

    without = TokenStats.start(6, tile.float(), False)
    tiles.tile_stats(Tile(tile, labels, transform, bias), without)
    for name in ("max", "sum", "label_logit"):
        assert torch.equal(getattr(without, name), getattr(stats, name)), name


@each_operand
@pytest.mark.parametrize("columns", WIDTHS)
def test_operand(tiles, columns, dtype, out_dtype):
    """After a first tile, whose maximum is the larger one in some rows."""
    rows = 6
    tile, bias, labels = made(rows, columns, dtype)
    stats = TokenStats.start(rows, tile.float(), True)
    stats.max.copy_(torch.tensor([-torch.inf, 30.0, 0.0, 5.0, -3.0, 9.0]))
    stats.sum.copy_(torch.tensor([0.0, 1.0, 2.0, 1.5, 7.0, 1e4]))
    truth = [None if value is None else value.double().clone() for value in vars(stats).values()]
    expected, rescale = TokenStats(*truth), torch.empty(rows, dtype=torch.float64)
    wide = tile.double()
    TorchBackend().tile_stats(Tile(wide, labels, CAPPED, bias.double()), expected, rescale=rescale)

    out = None if out_dtype is None else torch.full(tile.shape, torch.nan, dtype=out_dtype)
    found = torch.empty(rows)
    tiles.tile_stats(Tile(tile, labels, CAPPED, bias, out), stats, rescale=found)
    assert_near(found, rescale, rescale)
    for name, value in vars(stats).items():
        torch.testing.assert_close(value.double(), getattr(expected, name), rtol=4e-6, atol=4e-6)
    operand = tile if out is None else out
    assert_near(operand, wide, wide.abs())


@each_operand
@pytest.mark.parametrize("moments", [False, True], ids=["logp", "all"])
@pytest.mark.parametrize("columns", WIDTHS)
def test_grad(tiles, columns, moments, dtype, out_dtype):
    rows = 6
    tile, bias, labels = made(rows, columns, dtype)
    stats, _ = reference_stats(tile, bias, labels, CAPPED)
    lse = stats.max + stats.sum.log()
    flows = {"lse_value": lse - 0.5, "lse_rest": torch.full_like(lse, 0.5), "logp": torch.linspace(-1.0, 2.0, rows)}
    if moments:
        flows |= {name: torch.linspace(0.5, -2.0, rows) for name in ("lse", "entropy", "log_sum_p2")}
        flows["entropy_value"] = stats.sum.log() - stats.shifted_sum / stats.sum
        flows["log_sum_p2_value"] = stats.square_sum.log() - 2.0 * stats.sum.log()
    wide = tile.double()
    grads = TokenGrads(**flows)
    # terms cancel: each of them is up to 8 p
    logits = CAPPED.softcap * (CAPPED.scale * (wide + bias) / CAPPED.softcap).tanh()
    size = 8.0 * (logits - lse[:, None]).exp()
    inside = (labels >= 0) & (labels < columns)
    size[inside, labels[inside]] += grads.logp[inside].abs()
    TorchBackend().tile_grad(Tile(wide, labels, CAPPED, bias.double()), grads.map(torch.Tensor.double))
    out = None if out_dtype is None else torch.full(tile.shape, torch.nan, dtype=out_dtype)
    tiles.tile_grad(Tile(tile, labels, CAPPED, bias, out), grads.map(torch.Tensor.float))
    operand = tile if out is None else out
    assert_near(operand, wide, size + wide.abs())


@pytest.mark.parametrize("columns", [5, 700, 9000])
def test_order_of_threads_does_not_matter(tiles, columns, monkeypatch):
    """Each thread runs until it waits for others, from the first or from the last: a missing barrier would show."""
    found = []
    for order in ("forward", "reverse"):
        monkeypatch.setenv("SPO_EMULATOR_ORDER", order)
        tile, bias, labels = made(6, columns)
        stats, rescale = TokenStats.start(6, tile, True), torch.empty(6)
        tiles.tile_stats(Tile(tile, labels, CAPPED, bias), stats, rescale=rescale)
        found.append([*vars(stats).values(), rescale, tile])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("columns", [4, 700, 9000])
def test_ties_infinities_and_nothing(tiles, columns):
    """Rows of ties, of one infinity, of one NaN, and of -inf alone, in whichever thread they fall."""
    tile = torch.zeros(4, columns)
    for place in sorted({0, 1, columns // 2, columns - 1}):
        tile[1:] = 0.0
        tile[1, place], tile[2, place], tile[3] = torch.inf, torch.nan, -torch.inf
        stats, rescale = TokenStats.start(4, tile, True), torch.empty(4)
        labels = torch.full((4,), place)
        masses = torch.empty(4, mass_blocks(columns))
        tiles.tile_stats(Tile(tile, labels, PLAIN), stats, block_lse=masses)
        lse = stats.max + stats.sum.log()
        assert (
            stats.label_logit[0] == stats.max[0] == 0.0 and stats.sum[0] == columns and stats.square_sum[0] == columns
        )
        assert stats.shifted_sum[0] == 0.0 and not lse[1:3].isfinite().any()
        assert stats.max[3] == -torch.inf and stats.sum[3] == stats.shifted_sum[3] == stats.square_sum[3] == 0.0
        assert not masses[1:3, place // MASS_BLOCK].isfinite().any() and (masses[3] == -torch.inf).all()
        operand = torch.empty(4, columns, dtype=torch.bfloat16)
        given = Tile(tile, torch.full((4,), -1), PLAIN, out=operand)
        tiles.tile_stats(given, TokenStats.start(4, tile, False), rescale=rescale)
        assert (operand[0] == 1.0).all() and (operand[3] == 0.0).all()
        assert operand[1, place].isnan() and operand[2, place].isnan()


# ---- memory


class Guarded:
    """Memory that ends, or begins, where a page begins that nobody may touch."""

    def __init__(self, size, at_end):
        page = mmap.PAGESIZE
        pages = -(-size // page)
        self._memory = mmap.mmap(-1, (pages + 2) * page)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for start in (self._base, self._base + (pages + 1) * page):
            assert _libc.mprotect(ctypes.c_void_p(start), page, mmap.PROT_READ * 0) == 0
        self.offset = page + (pages * page - size if at_end else 0)

    def tensor(self, like):
        """`like` moved there."""
        view = torch.frombuffer(self._memory, dtype=like.dtype, count=like.numel(), offset=self.offset)
        return view.view(like.shape).copy_(like)


_libc = ctypes.CDLL(None, use_errno=True)


def guarded(like, at_end):
    return Guarded(like.numel() * like.element_size(), at_end).tensor(like)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 3, 129, 516, 2051, 8196, 8197])
def test_nothing_beyond_a_tensor_is_touched(tiles, columns, out_dtype, at_end):
    """A stray access ends the process: every tensor here borders on a page that may not be touched."""
    rows = 5
    tile, bias, labels = (guarded(x, at_end) for x in made(rows, columns))
    stats = TokenStats(*(guarded(value, at_end) for value in vars(TokenStats.start(rows, tile, True)).values()))
    masses = guarded(torch.empty(rows, mass_blocks(columns)), at_end)
    tiles.tile_stats(Tile(tile, labels, CAPPED, bias), stats, block_lse=masses)
    out = tile if out_dtype == torch.float32 else guarded(torch.empty(rows, columns, dtype=out_dtype), at_end)
    products = tile.clone()
    given = Tile(tile, labels, CAPPED, bias, None if out is tile else out)
    tiles.tile_stats(given, stats, rescale=guarded(torch.empty(rows), at_end))
    tile.copy_(products)
    grads = TokenGrads(guarded(stats.max + stats.sum.log(), at_end), logp=guarded(torch.ones(rows), at_end))
    tiles.tile_grad(given, grads)
    tiles.scale_rows(tile, guarded(torch.full((rows,), 0.5), at_end))
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", WIDTHS)
def test_scale_rows(tiles, columns, dtype):
    """Once rounded; a factor of 1 leaves everything as it is."""
    matrix = torch.randn(5, columns + 3).to(dtype)[:, :columns]
    factors = torch.tensor([2.5, 1.0, 0.0, -1e-3, 0.1])
    expected = (matrix.float() * factors[:, None]).to(dtype)
    tiles.scale_rows(matrix, factors)
    assert torch.equal(matrix, expected)


@pytest.mark.parametrize("shift", [0, 1, 4])
@pytest.mark.parametrize(("columns", "gap"), [(700, 0), (700, 1), (700, 4), (702, 2), (9001, 3), (257, 7)])
def test_rows_apart_and_anywhere(tiles, shift, columns, gap):
    """Views off a 16-byte boundary or with rows apart, aligned rows with ragged ends among them: the same bits, and
    nothing between the rows is written."""
    rows = 5
    tile, bias, labels = made(rows, columns)
    found = []
    for offset, space in ((0, 0), (shift, gap)):
        memory = torch.full((offset + rows * (columns + space),), 7.0)
        view = memory[offset:].view(rows, columns + space)[:, :columns]
        view.copy_(tile)
        stats, rescale = TokenStats.start(rows, tile, True), torch.empty(rows)
        tiles.tile_stats(Tile(view, labels, PLAIN, bias), stats, rescale=rescale)
        found.append([*vars(stats).values(), view.clone()])
        tiles.scale_rows(view, torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5]))
        found[-1].append(view.clone())
        view.fill_(7.0)
        assert (memory == 7.0).all()
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (0, 0)])
def test_empty_tiles(tiles, rows, columns):
    """No column changes nothing, and no row is no launch."""
    tile, labels = torch.empty(rows, columns), torch.zeros(rows, dtype=torch.int64)
    stats = TokenStats.start(rows, tile, True)
    tiles.tile_stats(Tile(tile, labels, PLAIN), stats, rescale=torch.empty(rows))
    assert (stats.max == -torch.inf).all() and (stats.sum == 0).all()
    tiles.tile_grad(Tile(tile, labels, PLAIN), TokenGrads(stats.max, logp=stats.sum))
    tiles.scale_rows(tile, torch.ones(rows))


# ---- errors


def test_a_failed_launch_names_kernel_and_shapes(monkeypatch):
    tiles = EmulatedBackend(emulated_module())
    monkeypatch.setattr(tiles, "device", -1)
    tile, labels = torch.zeros(3, 40), torch.zeros(3, dtype=torch.int64)
    stats = TokenStats.start(3, tile, False)
    with pytest.raises(RuntimeError, match=r"tile_stats of \[3, 40\] on device -1: .*cudaErrorInvalidDevice"):
        tiles.tile_stats(Tile(tile, labels, PLAIN), stats)
    with pytest.raises(RuntimeError, match=r"tile_grad of \[3, 40\]"):
        tiles.tile_grad(Tile(tile, labels, PLAIN), TokenGrads(stats.max, logp=stats.sum))
    assert "invalid device" in emulated_module().why_not(-1) and emulated_module().why_not(0) == ""


@pytest.mark.parametrize(
    ("dtype", "out"), [(torch.float32, torch.float64), (torch.float16, torch.float32), (torch.float16, torch.bfloat16)]
)
def test_operands_that_no_kernel_writes(tiles, dtype, out):
    tile = torch.zeros(2, 8, dtype=dtype)
    grads = TokenGrads(torch.zeros(2), logp=torch.zeros(2))
    with pytest.raises(ValueError, match=r"out: a torch.float(32|16) tile cannot be written as"):
        given = Tile(tile, torch.zeros(2, dtype=torch.int64), PLAIN, out=torch.zeros(2, 8, dtype=out))
        tiles.tile_grad(given, grads)


def test_mass_block_is_the_specifications():
    assert emulated_module().mass_block == MASS_BLOCK
