"""The extension's own matrix products against float64, for every instruction set that this machine has."""

import pytest
import torch

from spo_kernels.backends import cpp_extension
from spo_kernels.backends.contract import SCALARS
from spo_kernels.backends.cpp_products import NativeProducts
from spo_kernels.backends.products import VendorProducts

NATIVE, WHY_NOT = cpp_extension.load()
NAMES = NATIVE.product_names() if NATIVE else []
SHAPES = [(1, 1, 1), (5, 63, 2), (6, 64, 512), (7, 65, 513), (13, 130, 1025), (130, 17, 1), (97, 1, 700), (1, 200, 31)]
SHAPES += [(3, 70, 2049), (0, 5, 3), (5, 0, 3), (5, 3, 0)]
# several panels of columns at a time, rows packed by several tasks, two blocks of rows
SHAPES += [(103, 700, 33), (7, 2100, 19), (2100, 40, 9)]

pytestmark = pytest.mark.skipif(not NAMES, reason=f"no native products here: {WHY_NOT}")


def multiply(name, a, b, out, accumulate=False, threads=2, a_rows=None, b_rows=None, out_rows=None):
    def operand(matrix, rows):
        return (matrix.data_ptr(), *matrix.stride(), SCALARS[matrix.dtype], *address(matrix, rows))

    def address(matrix, rows):
        return (0 if rows is None else rows.data_ptr(), matrix.shape[0])

    NATIVE.product(
        name,
        operand(a, a_rows),
        operand(b, b_rows),
        (out.data_ptr(), out.stride(0), SCALARS[out.dtype], *address(out, out_rows)),
        (a.shape[0] if a_rows is None else a_rows.numel(), b.shape[1], a.shape[1]),
        accumulate,
        threads,
    )


def operand(rows, columns, dtype, layout):
    """A matrix in row order, in column order, or as an unaligned piece of a wider one."""
    if layout == "rows":
        return torch.randn(rows, columns).to(dtype)
    if layout == "columns":
        return torch.randn(columns, rows).to(dtype).t()
    return torch.randn(rows + 1, columns + 3).to(dtype)[1:, 1 : columns + 1]


def exact(name, a, b):
    """The float64 product of what the instruction set sees, and the sum of the terms' magnitudes."""
    if name == "avx512_bf16":
        a, b = a.bfloat16(), b.bfloat16()
    return a.double() @ b.double(), a.double().abs() @ b.double().abs()


@pytest.mark.parametrize("layout", ["rows", "columns", "piece"])
@pytest.mark.parametrize("dtype_b", list(SCALARS), ids=str)
@pytest.mark.parametrize("dtype_a", list(SCALARS), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_against_float64(name, dtype_a, dtype_b, layout):
    for m, n, k in SHAPES:
        a, b = operand(m, k, dtype_a, layout), operand(k, n, dtype_b, layout)
        expected, magnitude = exact(name, a, b)
        start = torch.randn(m, n)
        for accumulate in (False, True):
            out = start.clone()
            multiply(name, a, b, out, accumulate)
            error = (out.double() - expected - (start.double() if accumulate else 0)).abs()
            # each of k additions rounds by at most 2^-24 of what is summed
            bound = 2.0**-24 * (k + 2) * (magnitude + start.double().abs())
            assert (error <= bound).all(), (m, n, k, accumulate, (error / bound).max().item())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", ["rows", "columns", "piece"])
@pytest.mark.parametrize("dtype", list(SCALARS), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_listed_rows(name, dtype, layout, threads):
    for m, n, k in SHAPES:
        a, b = operand(m + 9, k, torch.float32, layout), operand(k + 5, n, dtype, layout)
        # rows of the operands may repeat, in any order; those of the result are distinct
        a_rows, b_rows = torch.randint(m + 9, (m,)), torch.randint(k + 5, (k,))
        out_rows = torch.randperm(m + 4)[:m]
        start = torch.randn(m + 4, n)
        for accumulate in (False, True):
            plain = start[out_rows]
            multiply(name, a[a_rows], b[b_rows], plain, accumulate)
            expected = start.clone().index_copy_(0, out_rows, plain)
            out = start.clone()
            multiply(name, a, b, out, accumulate, threads, a_rows, b_rows, out_rows)
            assert torch.equal(out, expected), (m, n, k, accumulate)


@pytest.mark.parametrize("name", NAMES)
def test_writes_only_its_result(name):
    out = torch.full((9, 40), torch.nan)
    multiply(name, torch.ones(7, 3), torch.ones(3, 37), out[1:8, 2:39])
    inside = torch.zeros(9, 40, dtype=torch.bool)
    inside[1:8, 2:39] = True
    assert (out[inside] == 3).all() and out[~inside].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_for_any_number_of_threads(name):
    a, b = torch.randn(301, 1100), torch.randn(1100, 70)
    results = []
    for threads in (1, 2, 5):
        out = torch.empty(301, 70)
        multiply(name, a, b, out, threads=threads)
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [70, 700], ids=["panels packed for all", "own panels"])
def test_threads_ahead_of_each_other(name, n):
    """Several blocks of rows and of K; more threads than cores are held up anywhere, and the others go on."""
    a, b = torch.randn(4500, 2100).t(), torch.randn(4500, n)
    expected = torch.empty(2100, n)
    multiply(name, a, b, expected, threads=1)
    for _ in range(10):
        out = torch.empty(2100, n)
        multiply(name, a, b, out, threads=7)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_non_finite_values_come_through(name, value):
    a, b = torch.ones(8, 5), torch.ones(5, 66)
    a[3, 2] = value
    out = torch.empty(8, 66)
    multiply(name, a, b, out)
    assert torch.equal(out[3], torch.full((66,), value)) or (value != value and out[3].isnan().all())
    assert (out[torch.arange(8) != 3] == 5).all()


def test_bfloat16_rounding_is_torchs():
    if "avx512_bf16" not in NAMES:
        pytest.skip("this machine has no bfloat16 dot product")
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    # subnormal results are flushed by the instruction, so leave them out
    values = values[(values.abs() > 1e-30) & values.isfinite()][:2048, None]
    out = torch.empty(values.shape[0], 1)
    multiply("avx512_bf16", values, torch.ones(1, 1), out)
    assert torch.equal(out, values.bfloat16().float())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", ["rows", "columns", "piece"])
@pytest.mark.parametrize("dtype", list(SCALARS), ids=str)
def test_rounded_results(dtype, layout, threads):
    """The float32 result, rounded once."""
    if "avx512_bf16" not in NAMES:
        pytest.skip("this machine has no bfloat16 dot product")
    for m, n, k in [*SHAPES, (200, 67, 4), (7, 65, 2048)]:
        if k > NATIVE.rounded_depth:
            continue
        a, b = operand(m, k, dtype, layout), operand(k, n, dtype, layout)
        wide, out = torch.empty(m, n), torch.full((m + 2, n + 1), 7.0, dtype=torch.bfloat16)
        multiply("avx512_bf16", a, b, wide, threads=threads)
        multiply("avx512_bf16", a, b, out[1:-1, 1:], threads=threads)
        assert torch.equal(out[1:-1, 1:], wide.bfloat16()), (m, n, k)
        out[1:-1, 1:] = 7.0
        assert (out == 7.0).all()


def test_results_that_cannot_be_rounded_are_refused():
    a, b, out = torch.ones(2, 3), torch.ones(3, 4), torch.empty(2, 4, dtype=torch.bfloat16)
    long = torch.ones(2, 2049), torch.ones(2049, 4)
    for name in NAMES:
        accumulated = name == "avx512_bf16"
        with pytest.raises(ValueError, match=f"product '{name}' cannot write such a result"):
            multiply(name, a, b, out, accumulated)
        with pytest.raises(ValueError, match=f"product '{name}' cannot write such a result"):
            multiply(name, *long, out)


def test_unknown_product_is_refused():
    with pytest.raises(ValueError, match="'sse9' cannot run on this machine"):
        multiply("sse9", torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1))


def test_wrong_result_shape_is_refused_before_the_pointer_crosses(monkeypatch):
    monkeypatch.setenv("SPO_CPU_PRODUCT", "native")
    products = NativeProducts(NATIVE)
    with pytest.raises(ValueError, match=r"out must be a float32 \[2, 4\] matrix"):
        products.matmul(torch.ones(2, 3), torch.ones(3, 4), out=torch.ones(2, 5))


@pytest.mark.parametrize("choice", ["native", "vendor"])
@pytest.mark.parametrize("name, size", [("a_rows", 4), ("b_rows", 3), ("out_rows", 4)])
def test_row_lists_are_checked(monkeypatch, choice, name, size):
    monkeypatch.setenv("SPO_CPU_PRODUCT", choice)
    products = NativeProducts(NATIVE)
    a, b, out = torch.ones(4, 3), torch.ones(3, 2), torch.full((4, 2), 7.0)
    for outside in (-1, size, 2**62, -(2**63)):
        rows = torch.arange(size)
        rows[1] = outside
        with pytest.raises(IndexError):
            products.matmul(a, b, out, **{name: rows})
    assert (out == 7).all() or choice == "vendor"
    for wrong in (torch.arange(size, dtype=torch.int32), torch.arange(2 * size)[::2], torch.arange(size)[:, None]):
        with pytest.raises(ValueError, match=f"{name} must be a contiguous int64 vector"):
            products.matmul(a, b, out, **{name: wrong})


@pytest.mark.parametrize("name", ["a_rows", "b_rows", "out_rows"])
def test_row_lists_of_the_wrong_length_are_refused(monkeypatch, name):
    monkeypatch.setenv("SPO_CPU_PRODUCT", "native")
    with pytest.raises(ValueError, match="out must be a float32"):
        NativeProducts(NATIVE).matmul(
            torch.ones(4, 3), torch.ones(3, 2), torch.ones(4, 2), **{name: torch.zeros(2, dtype=torch.int64)}
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_choice_by_environment(monkeypatch, dtype):
    monkeypatch.setenv("SPO_CPU_PRODUCT", "vendor")
    assert NativeProducts(NATIVE).operand_dtype(torch.ones(1, dtype=dtype)) == torch.float32
    monkeypatch.setenv("SPO_CPU_PRODUCT", "native")
    assert NativeProducts(NATIVE).operand_dtype(torch.ones(1, dtype=dtype)) == dtype
    monkeypatch.setenv("SPO_CPU_PRODUCT", "fastest")
    with pytest.raises(ValueError, match="SPO_CPU_PRODUCT = 'fastest'"):
        NativeProducts(NATIVE)


class AMD:
    """The extension on a processor of AMD's with one product, which this machine's own computes."""

    def __init__(self, name):
        self.name = name

    def made_by_amd(self):
        return True

    def product_names(self):
        return [self.name]

    def product(self, name, *arguments):
        assert name == self.name
        return NATIVE.product(NATIVE.product_names()[0], *arguments)


@pytest.mark.parametrize("amd, own", [(True, "avx2"), (False, None)])
def test_float32_is_the_vendors_where_amd_did_not_make_the_processor(monkeypatch, amd, own):
    monkeypatch.setenv("SPO_CPU_PRODUCT", "auto")
    monkeypatch.setattr(AMD, "made_by_amd", lambda self: amd)
    products = NativeProducts(AMD("avx2"))
    assert products.own_product(torch.float32) == own
    assert products.own_product(torch.bfloat16) == "avx2"


@pytest.mark.parametrize(
    "choice, rows, columns, listed, dtype, own",
    [
        ("auto", 2, 64, False, torch.float32, False),
        ("auto", 64, 1, False, torch.float32, False),
        ("auto", 3, 3, False, torch.float32, True),  # larger
        ("auto", 2, 64, True, torch.float32, True),  # the vendor's library reads no lists
        ("auto", 2, 64, False, torch.float16, True),  # nor half precision beside float32
        ("native", 2, 64, False, torch.float32, True),
    ],
)
def test_narrow_products_are_the_vendors(monkeypatch, choice, rows, columns, listed, dtype, own):
    monkeypatch.setenv("SPO_CPU_PRODUCT", choice)
    asked = []

    class Counted(AMD):
        def product(self, *arguments):
            asked.append(arguments)
            return super().product(*arguments)

    a, b = torch.randn(rows, 64), torch.randn(64, columns).to(dtype)
    out = torch.empty(rows, columns)
    NativeProducts(Counted("avx512")).matmul(a, b, out, a_rows=torch.arange(rows) if listed else None)
    torch.testing.assert_close(out, a @ b.float())
    assert bool(asked) == own


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_and_vendor_agree(monkeypatch, dtype, lists):
    monkeypatch.setenv("SPO_CPU_PRODUCT", "native")
    a, b = torch.randn(33, 300), torch.randn(300, 129).to(dtype)
    rows = {}
    if lists:
        rows = {"a_rows": torch.randint(33, (20,)), "b_rows": torch.randperm(300), "out_rows": torch.randperm(33)[:20]}
    results = []
    for products in (NativeProducts(NATIVE), VendorProducts()):
        out = torch.zeros(33, 129)
        right = b.to(products.operand_dtype(b))
        products.matmul(a, right, out=out, **rows)
        products.matmul(a, right, out=out, accumulate=True, **rows)
        results.append(out)
    tolerance = 0.3 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(*results, atol=tolerance, rtol=0)
