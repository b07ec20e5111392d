"""Block masses of the CPU tile backends against float64; the rest of a tile's contract is tested through the driver."""

import pytest
import torch

from spo_kernels import _native, backend_info
from spo_kernels._backend import load_backend
from spo_kernels.tiles.spec import MASS_BLOCK, LogitTransform, TokenStats, mass_blocks

ROWS = 35
TRANSFORMS = {"plain": LogitTransform(), "scale": LogitTransform(0.7), "softcap": LogitTransform(1.5, 30.0)}


@pytest.fixture(params=["torch", "cpp"])
def tiles(request):
    """A tile backend that runs here."""
    status = backend_info()[request.param]
    if not status.available:
        pytest.skip(status.detail)
    return load_backend(request.param).tiles


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
        tiles.tile_stats(tile, bias, labels, transform, with_masses, None, block_lse=masses)
        tiles.tile_stats(tile, bias, labels, transform, plain, None)
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
    tiles.tile_stats(tile, None, torch.zeros(4, dtype=torch.int64), LogitTransform(), stats, None, block_lse=masses)
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
        load_backend("cpp").tiles.tile_stats(
            tile, None, torch.zeros(4, dtype=torch.int64), LogitTransform(), stats, rescale, block_lse=masses
        )


def test_block_width_is_the_same_in_both_languages():
    native, detail = _native.load()
    if native is None:
        pytest.skip(detail)
    assert native.mass_block == MASS_BLOCK
