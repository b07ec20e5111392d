"""Tiles of the CPU backends against float64: block masses, views with rows apart, bfloat16 operands."""

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, instruction_set

from spo_kernels import backend_info
from spo_kernels.backends import cpp_extension
from spo_kernels.backends.contract import MASS_BLOCK, LogitTransform, Tile, TokenGrads, TokenStats, mass_blocks
from spo_kernels.backends.registry import load_backend
from spo_kernels.backends.torch_backend import TorchBackend

ROWS = 35
TRANSFORMS = {"plain": LogitTransform(), "scale": LogitTransform(0.7), "softcap": LogitTransform(1.5, 30.0)}


@pytest.fixture(params=["torch", *INSTRUCTION_SETS])
def tiles(request):
    """A backend that runs here; that of C++ once with each instruction set."""
    if request.param == "torch":
        yield load_backend("torch")
        return
    with instruction_set(request.param):
        yield load_backend("cpp")


def logits64(tile, bias, transform):
    logits = (tile.double() + bias.double()) * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("columns", [1, 127, 128, 129, 1000])
def test_block_masses(tiles, columns, transform):
    """Of two tiles, the second below the first's maximum; statistics are those of a call without masses."""
    torch.manual_seed(0)
    plain, with_masses = (TokenStats.start(ROWS, torch.empty(0), moments=True) for _ in range(2))
    labels = torch.arange(ROWS) * 31 - 40
    pieces = []
    for shift in (0.0, -20.0):
        tile = 6.0 * torch.randn(ROWS, columns) + shift
        bias = torch.randn(columns)
        before = tile.clone()
        masses = torch.full((ROWS, mass_blocks(columns) + 3), torch.nan)[:, :-3]
        given = Tile(tile, labels, transform, bias)
        tiles.tile_stats(given, with_masses, block_lse=masses)
        tiles.tile_stats(given, plain)
        assert torch.equal(tile, before)
        expected = [block.logsumexp(1) for block in logits64(tile, bias, transform).split(MASS_BLOCK, 1)]
        torch.testing.assert_close(masses.double(), torch.stack(expected, 1), rtol=2e-6, atol=4e-6)
        pieces.append(masses)
    for name, value in vars(plain).items():
        assert torch.equal(value, getattr(with_masses, name)), name
    whole = torch.cat(pieces, 1).double().logsumexp(1)
    torch.testing.assert_close(whole, (plain.max + plain.sum.log()).double(), rtol=2e-6, atol=4e-6)


def test_masses_of_extreme_logits(tiles):
    """Blocks of -inf, a lone finite logit, values at both ends of the exponential's range, and a NaN."""
    tile = torch.full((4, 3 * MASS_BLOCK), -torch.inf)
    tile[1, 5] = -300.0
    tile[2, MASS_BLOCK] = 1000.0
    tile[2, 2 * MASS_BLOCK] = 920.0
    tile[3, 7] = torch.nan
    masses = torch.empty(4, 3)
    stats = TokenStats.start(4, tile, moments=False)
    tiles.tile_stats(Tile(tile, torch.zeros(4, dtype=torch.int64), LogitTransform()), stats, block_lse=masses)
    inf = torch.inf
    expected = torch.tensor([[-inf, -inf, -inf], [-300.0, -inf, -inf], [-inf, 1000.0, 920.0]])
    torch.testing.assert_close(masses[:3], expected)
    assert masses[3, 0].isnan()


@pytest.mark.parametrize("wrong", ["shape", "dtype", "rescale"])
def test_bad_masses(wrong):
    """The C++ kernels get an address: what lies behind it is checked before."""
    if not backend_info()["cpp"].available:
        pytest.skip(backend_info()["cpp"].detail)
    tile = torch.zeros(4, 200)
    masses = torch.empty(4, 1 if wrong == "shape" else 2, dtype=torch.float64 if wrong == "dtype" else torch.float32)
    rescale = torch.empty(4) if wrong == "rescale" else None
    stats = TokenStats.start(4, tile, moments=False)
    with pytest.raises(ValueError, match="block_lse"):
        given = Tile(tile, torch.zeros(4, dtype=torch.int64), LogitTransform())
        load_backend("cpp").tile_stats(given, stats, rescale=rescale, block_lse=masses)


def apart(values, gap, dtype=torch.float32):
    """The values in rows `gap` apart, in memory of sevens."""
    memory = torch.full((values.shape[0], values.shape[1] + gap), 7.0, dtype=dtype)
    memory[:, : values.shape[1]] = values
    return memory, memory[:, : values.shape[1]]


def rounding(dtype):
    """Half a unit in the last place, relative; of float32 a few, for the exponential."""
    return 2.0**-8 if dtype == torch.bfloat16 else 1e-6


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("columns", [1, 129, 1000])
def test_operands(tiles, columns, transform, out_dtype):
    """What the passes write in place (None) or to an operand, of tiles with rows apart; what lies between stays."""
    torch.manual_seed(0)
    values, bias = 6.0 * torch.randn(ROWS, columns), torch.randn(columns)
    labels = torch.arange(ROWS) * 31 - 40
    wide, lse = values.double(), logits64(values, bias, transform).logsumexp(1)
    stats, rescale = TokenStats.start(ROWS, wide, True), torch.empty(ROWS, dtype=torch.float64)
    TorchBackend().tile_stats(Tile(wide, labels, transform, bias.double()), stats, rescale=rescale)
    upstream = {"logp": torch.linspace(-1.0, 2.0, ROWS), "lse": torch.linspace(0.5, -0.5, ROWS)}
    gradient = values.double()
    flows = {name: value.double() for name, value in upstream.items()}
    TorchBackend().tile_grad(Tile(gradient, labels, transform, bias.double()), TokenGrads(lse, **flows))

    found, found_rescale = TokenStats.start(ROWS, values, True), torch.empty(ROWS)
    grads = TokenGrads(lse.float(), lse_rest=(lse - lse.float()).float(), **upstream)
    for expected, run in (
        (wide, lambda tile: tiles.tile_stats(tile, found, rescale=found_rescale)),
        (gradient, lambda tile: tiles.tile_grad(tile, grads)),
    ):
        memory, tile = apart(values, 5)
        out_memory, out = (memory, None) if out_dtype is None else apart(torch.zeros_like(values), 3, out_dtype)
        given = Tile(tile, labels, transform, bias, out)
        run(given)
        operand = given.written
        scale = 40.0 if transform.softcap else 30.0  # an error of 1 in the last place of a logit of up to 30
        bound = rounding(operand.dtype) * expected.abs() + scale * 1e-7 * expected.abs() + 1e-7
        assert ((operand.double() - expected).abs() <= bound).all()
        assert (out_memory[:, columns:] == 7.0).all() and (memory[:, columns:] == 7.0).all()
    for name, value in vars(found).items():
        torch.testing.assert_close(value.double(), getattr(stats, name), rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 31, 128, 1000])
def test_scale_rows(tiles, columns, dtype):
    memory, matrix = apart(torch.randn(ROWS, columns), 3, dtype)
    factors = torch.linspace(-2.0, 2.0, ROWS).index_fill_(0, torch.tensor([4]), 1.0)
    expected = (matrix.float() * factors[:, None]).to(dtype)
    tiles.scale_rows(matrix, factors)
    assert torch.equal(matrix, expected)
    assert (memory[:, columns:] == 7.0).all()


def test_rounding_to_bfloat16():
    """Ties to even, infinities, NaN, subnormals and the largest float, as torch rounds them."""
    if not backend_info()["cpp"].available:
        pytest.skip(backend_info()["cpp"].detail)
    bits = torch.randint(-(2**31), 2**31, (1, 4096), generator=torch.Generator().manual_seed(0)).int()
    bits[0, 1::4] = bits[0, 1::4] & -65536 | 0x8000
    values = bits.view(torch.float32)
    values[0, :6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, -0.0])
    out = torch.empty(1, 4096, dtype=torch.bfloat16)
    tiles = load_backend("cpp")
    # with everything flowing into lse and all probabilities 1, the gradient is what flows: 4096 rows of one column
    column, labels = torch.zeros(4096, 1), torch.full((4096,), -1)
    given = Tile(column, labels, LogitTransform(), out=out.view(-1, 1))
    tiles.tile_grad(given, TokenGrads(torch.zeros(4096), lse=values[0]))
    expected = values.bfloat16()
    same = (out == expected) | (out.isnan() & expected.isnan())
    assert same.all()


@pytest.mark.parametrize("wrong", ["dtype", "shape", "strides", "tile"])
def test_bad_operands(wrong):
    if not backend_info()["cpp"].available:
        pytest.skip(backend_info()["cpp"].detail)
    tile = torch.zeros(4, 200, dtype=torch.float64 if wrong == "tile" else torch.float32)
    out = torch.zeros(4, 100 if wrong == "shape" else 200, dtype=torch.float16 if wrong == "dtype" else torch.bfloat16)
    out = torch.zeros(200, 4, dtype=torch.bfloat16).t() if wrong == "strides" else out
    grads = TokenGrads(torch.zeros(4), logp=torch.zeros(4))
    with pytest.raises(ValueError, match="products: expected" if wrong == "tile" else "out: expected"):
        load_backend("cpp").tile_grad(Tile(tile, torch.zeros(4, dtype=torch.int64), LogitTransform(), out=out), grads)


def test_block_width_is_the_same_in_both_languages():
    native, detail = cpp_extension.load()
    if native is None:
        pytest.skip(detail)
    assert native.mass_block == MASS_BLOCK
