"""Which path is taken by default, in which shape, and that a run takes the bytes which the plan says."""

import dataclasses
import re

import pytest
import torch

from spo_kernels import LMHead, backend_info, fused_spo_loss
from spo_kernels import loss as loss_module
from spo_kernels.__main__ import main
from spo_kernels.backends.registry import load_backend
from spo_kernels.engine import kept_space
from spo_kernels.engine.inputs import ModelInputs
from spo_kernels.engine.kept_space import KeptSpace, default_bytes
from spo_kernels.engine.workspace import plan_tiles
from spo_kernels.losses import DPO, SPO
from spo_kernels.preference.forecast import Head, forecast
from spo_kernels.preference.plan import PairProblem, choose_path, plan_path
from spo_kernels.testing import TensorMeter

MIB, GIB = 1 << 20, 1 << 30
# a token's row takes 128 KiB, an accumulator 128 MiB, that is 1024 rows
SPACE = KeptSpace(
    allowed=0,
    given=True,
    direct=True,
    vocab=32768,
    widest=lambda rows: 32768,
    wanted_rows=1024,
    least_rows=768,
    row_bytes=32768 * 4,
    column_bytes=0,
    cast_bytes=0,
    cell_bytes=0,
    accumulator_bytes=32768 * 1024 * 4,
    rounds=lambda rows: False,
)
PROBLEM = PairProblem(coupling="margin", whole_pairs=False, pair_tokens=(1024, 1024), longest=512, space=SPACE)


def problem(**changes):
    of_space = {name: changes.pop(name) for name in list(changes) if hasattr(SPACE, name)}
    if "pair_tokens" in changes:
        changes.setdefault("longest", max(changes["pair_tokens"]) // 2)
    return dataclasses.replace(PROBLEM, space=dataclasses.replace(SPACE, **of_space), **changes)


@pytest.mark.parametrize(
    "changes, path",
    [
        ({"allowed": 128 * MIB}, "packed"),
        ({"allowed": 127 * MIB}, "two_pass"),  # a pair does not fit, nor rows beside an accumulator
        ({"allowed": 127 * MIB, "pair_tokens": (4096,)}, "factorised"),  # summed where it will stay
        ({"allowed": 127 * MIB, "pair_tokens": (4096,), "coupling": "pair"}, "two_pass"),
        ({"allowed": 255 * MIB, "pair_tokens": (4096,), "coupling": "pair"}, "factorised"),
        ({"allowed": 255 * MIB, "pair_tokens": (4096,), "coupling": "batch"}, "two_pass"),
        ({"allowed": 255 * MIB, "pair_tokens": (4096,), "direct": False}, "factorised"),
        ({"allowed": 255 * MIB, "pair_tokens": (4096,), "whole_pairs": True}, "two_pass"),
        ({"allowed": 128 * MIB, "whole_pairs": True}, "packed"),
        ({"allowed": 767 << 17, "pair_tokens": (4096,)}, "two_pass"),  # tiles too flat to pay
        ({"allowed": 1 * GIB, "pair_tokens": (1024,) * 16, "longest": 512, "direct": False}, "packed"),
        ({"allowed": 64 << 17, "pair_tokens": (64,)}, "packed"),  # all there is in one tile
        ({"allowed": 64 << 17, "pair_tokens": (64,) * 8}, "two_pass"),
        # a tile is of one response: these are too short to go through the weight for each
        ({"allowed": 2047 << 17, "pair_tokens": (2048,) * 2, "longest": 767, "coupling": "pair"}, "two_pass"),
        ({"allowed": 1 * GIB, "pair_tokens": (0, 0)}, "packed"),
        # both ways fit: the one with fewer bytes, unless its tiles are below the wanted size
        ({"allowed": 1 * GIB, "pair_tokens": (2048,)}, "factorised"),
        ({"allowed": 1 * GIB, "pair_tokens": (2040,)}, "packed"),
        ({"allowed": 1 * GIB, "pair_tokens": (2048,), "direct": False}, "packed"),
        # with no bytes given, a second accumulator comes on top
        ({"allowed": 256 * MIB, "pair_tokens": (4096,) * 2, "coupling": "pair"}, "two_pass"),
        ({"allowed": 256 * MIB, "pair_tokens": (4096,) * 2, "coupling": "pair", "given": False}, "factorised"),
    ],
)
def test_choice(changes, path):
    assert choose_path(problem(**changes)).path == path


@pytest.mark.parametrize(
    "changes, groups, mib",
    [
        ({"pair_tokens": (1024, 1024)}, [1, 1], 128),  # fewer bytes than both at once
        ({"pair_tokens": (1000, 1000), "direct": False}, [2], 250),  # both at once need no sum beside them
        ({"pair_tokens": (1024,) * 4, "direct": False}, [1] * 4, 128 + 128),
        ({"pair_tokens": (512,) * 6}, [2, 2, 2], 128),
        ({"pair_tokens": (300,) * 8}, [3, 3, 2], 900 / 8),  # what the groups need, not what they may
        ({"pair_tokens": (400,) * 5}, [3, 2], 150),  # three groups would be too small
        ({"pair_tokens": (1024,) * 3, "allowed": 127 * MIB, "coupling": "pair"}, None, None),
        ({"pair_tokens": (384,) * 3, "allowed": 768 << 17}, None, None),  # 576 in the mean
        ({"pair_tokens": (384,) * 4, "allowed": 768 << 17}, [2, 2], 96),
        ({"pair_tokens": (3000, 8), "whole_pairs": True}, [1, 1], 375),
    ],
)
def test_groups_take_the_fewest_bytes(changes, groups, mib):
    plan = choose_path(problem(**{"allowed": GIB, **changes}))
    assert (None if plan.path == "two_pass" else [len(group) for group in plan.groups]) == groups
    if mib is not None:
        assert plan.shape.bytes == mib * MIB


VOCAB, HIDDEN = 2500, 48
# what a token has beside: statistics, coefficients, places, and the maximum of each slice of the vocabulary
PER_TOKEN = 12 * 8


@pytest.mark.parametrize("loss", [DPO(), SPO(DPO())], ids=["dpo", "spo"])
@pytest.mark.parametrize("lengths", [[300, 260], [900, 700], [300, 310, 290, 305]], ids=["short", "long", "pairs"])
@pytest.mark.parametrize("path", ["packed", "factorised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_takes_the_bytes_of_the_plan(monkeypatch, dtype, path, lengths, loss):
    if not backend_info()["cpp"].available:
        pytest.skip(backend_info()["cpp"].detail)
    monkeypatch.setitem(kept_space._WANTED_ROWS, "cpu", 600)
    labels = torch.full((len(lengths), max(lengths) + 1), -100)
    for row, length in zip(labels, lengths, strict=True):
        row[:length] = torch.randint(VOCAB, (length,))
    hidden, weight = torch.randn(*labels.shape, HIDDEN, dtype=dtype), torch.randn(VOCAB, HIDDEN, dtype=dtype)
    leaves, found = (hidden.requires_grad_(), weight.requires_grad_()), []
    monkeypatch.setattr(loss_module, "plan_path", lambda *given: found.append(plan_path(*given)) or found[0])
    with TensorMeter() as meter:
        value, _ = fused_spo_loss(*leaves, labels, loss=loss, ref_logps=torch.zeros(len(lengths)), path=path)
        value.backward()
    ((plan,), products) = found, load_backend("cpp").products
    assert plan.path == path
    # a native product packs its operand where no tensor is
    expected = plan.shape.bytes - plan.shape.rows * products.row_bytes + hidden.nbytes + weight.nbytes
    assert expected <= meter.peak <= expected + PER_TOKEN * labels.numel()


@pytest.mark.parametrize(
    "backend, dtype, columns",
    [
        ("torch", torch.float32, VOCAB),
        ("torch", torch.bfloat16, 2048),  # of which each is cast
        ("cpp", torch.float32, VOCAB),  # the library's own: the tests' environment asks for them
        ("cpp", torch.bfloat16, 2048),  # whose gradient is cast
    ],
)
def test_columns_that_take_no_memory_are_multiplied_at_once(backend, dtype, columns):
    if not backend_info()[backend].available:
        pytest.skip(backend_info()[backend].detail)
    hidden, weight, labels = torch.zeros(20, HIDDEN, dtype=dtype), torch.zeros(VOCAB, HIDDEN, dtype=dtype), [0] * 20
    slices = ModelInputs.resolve(hidden, weight, torch.tensor(labels)).slices()
    shape = KeptSpace.of(hidden, slices, load_backend(backend), None).shape(20, 0, sum_apart=False)
    assert shape is not None and shape.columns == columns


@pytest.mark.parametrize(
    "workspace_bytes, path, accumulate",
    [
        (None, "packed", False),
        (24 * MIB, "packed", False),
        (20 * MIB, "factorised", False),
        (10 * MIB, "two_pass", False),
        (24 * MIB, "packed", True),
        (20 * MIB, "two_pass", True),
    ],
)
def test_a_forecast_is_what_a_call_plans(monkeypatch, workspace_bytes, path, accumulate):
    lengths, found = [900, 800], []
    labels = torch.randint(VOCAB, (2, 900))
    labels[1, 800:] = -100
    hidden, weight = torch.randn(2, 900, HIDDEN, requires_grad=True), torch.randn(VOCAB, HIDDEN, requires_grad=True)
    if accumulate:
        weight.grad = torch.zeros_like(weight)
    head = LMHead(weight, accumulate=accumulate)
    monkeypatch.setattr(loss_module, "plan_path", lambda *given: found.append(plan_path(*given)) or found[0])
    with TensorMeter() as meter:
        value, _ = fused_spo_loss(
            hidden, head, labels, loss="dpo", ref_logps=torch.zeros(2), workspace_bytes=workspace_bytes
        )
        value.backward()
    shapes = Head(VOCAB, HIDDEN, torch.float32, torch.device("cpu"))
    made = forecast(DPO(), lengths, shapes, workspace_bytes, adds_to_grad=accumulate)
    assert found == [made.plan] and made.plan.path == path
    assert meter.peak <= made.workspace + hidden.nbytes + weight.nbytes + PER_TOKEN * labels.numel()


LLAMA = Head(128_256, 4096, torch.bfloat16, torch.device("cuda"), memory=79 * GIB)


@pytest.mark.parametrize("loss", [DPO(), SPO(DPO())], ids=["dpo", "spo"])
@pytest.mark.parametrize("lengths", [[1024] * 2, [512] * 8, [32768] * 2], ids=["1", "4", "long"])
def test_three_products_by_default_on_a_gpu(lengths, loss):
    """V = 128,256, H = 4096, bf16 and what a card of 80 GB has: in a sixteenth of it."""
    made = forecast(loss, lengths, LLAMA)
    assert made.plan.products == 3
    assert made.plan.shape.rows >= 2048 and made.plan.shape.columns == 8192
    assert made.workspace <= min(made.allowed, LLAMA.memory // 16)


def test_a_gpu_tile_is_a_block_wide_where_an_operand_is_written():
    """Also where the call says how many bytes; float32 products are written over, and kept whole."""
    assert forecast(DPO(), [1024] * 2, LLAMA, 40 * GIB).plan.shape.columns == 8192
    full = dataclasses.replace(LLAMA, dtype=torch.float32)
    assert forecast(DPO(), [1024] * 2, full, 40 * GIB).plan.shape.columns == LLAMA.vocab


def test_few_tokens_have_wider_tiles_on_a_gpu():
    """Kept exponentials of a row that is read twice until there are 2^22 cells, other tiles until there are 2^25,
    or 512 MiB with the gradient of their columns."""
    kept = {tokens: forecast(DPO(), [tokens] * 2, LLAMA).plan.shape.columns for tokens in (32, 128, 512)}
    assert kept == {32: 65536, 128: 16384, 512: 8192}
    head = LLAMA.policy(64).slices()

    def tiles(tokens, **options):
        hidden = LLAMA.policy(tokens).hidden
        return plan_tiles(tokens, hidden, head, LLAMA.backend(), None, **options)

    for tokens, reading, writing in ((256, 29568, 16384), (1024, 22656, 8192), (8192, 8192, 8192)):
        assert tiles(tokens, exponentials=False).columns == reading
        assert tiles(tokens, exponentials=True).columns == writing


@pytest.mark.parametrize("width, workspace", [(16384, None), (4096, 8 * MIB), (1024, MIB)])
def test_wide_hidden_states_leave_a_tile_its_rows(width, workspace):
    """Columns that take all of the budget left one row, in 11 times the time of a trained head."""
    head = Head(32768, width, torch.float32, torch.device("cpu"))
    policy = head.policy(1024)
    tile = plan_tiles(1024, policy.hidden, policy.slices(), head.backend(), workspace, exponentials=True)
    assert tile.rows >= 32 and tile.columns >= 128 and tile.bytes <= (workspace or 32 * MIB)


@pytest.mark.parametrize(
    "head, gradient, memory, expected",
    [
        (64 * MIB, 20 * MIB, None, 256 * MIB),
        (64 * MIB, 65 * MIB, None, 387 * MIB),
        (10 * MIB, 0, None, 256 * MIB),
        (GIB, GIB, 80 * GIB, 3 * GIB),
        (GIB, GIB, 24 * GIB, 3 * GIB // 2),
    ],
)
def test_the_default_workspace(head, gradient, memory, expected):
    assert default_bytes(head, gradient, memory) == expected


# the shapes of the benchmarks: pairs, tokens of a response, H, V, dtype
SHAPES = [(2, 512, 1024, 32768), (1, 256, 768, 50257), (4, 512, 512, 32000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs, tokens, width, vocab", SHAPES)
def test_three_products_by_default_on_a_cpu(pairs, tokens, width, vocab, dtype):
    """In no more than 1.3 times what logits of the dtype of the products would take, with the columns in work."""
    made = forecast(DPO(), [tokens] * 2 * pairs, Head(vocab, width, dtype, torch.device("cpu")))
    like = torch.empty(0, dtype=dtype)
    kept = load_backend("cpp" if backend_info()["cpp"].available else "torch").products.tile_dtype(like)
    assert made.plan.products == 3
    assert made.workspace <= 1.3 * 2 * pairs * tokens * vocab * kept.itemsize


def test_the_command(capsys):
    given = "plan --tokens 1024 --vocab 128256 --hidden 4096 --loss dpo --device cuda --memory-gib 80"
    assert main(given.split()) == 0
    text = capsys.readouterr().out
    made = forecast(DPO(), [1024] * 2, dataclasses.replace(LLAMA, memory=80 * GIB))
    for part in (
        "loss: ",
        "with a trained head, bfloat16",
        "products: 3 of [2048, 4096] x [4096, 128256]",
        "path: packed",
        f"{made.workspace} bytes",
    ):
        assert part in text


def test_the_command_tells_the_budget_from_what_the_backward_is_left(capsys):
    """Two passes keep to a MiB of workspace, and hidden's gradient of 16 MiB lies beside it."""
    given = "plan --tokens 1024 --vocab 32000 --hidden 4096 --device cpu --workspace-mib 1"
    assert main(given.split()) == 0
    text = capsys.readouterr().out
    assert "workspace and the [2048, 4096] left to the backward, at most: " in text
    assert 16 * MIB < int(re.search(r"at most: (\d+) bytes", text)[1]) <= 17 * MIB


@pytest.mark.parametrize(
    "given, message",
    [
        ("--tokens 5 --device cpu --memory-gib 3", "--memory-gib is a GPU's"),
        ("--lengths 5,6,7", "an even number of lengths"),
        ("--tokens 5 --device cpu --loss nothing", "loss = 'nothing'"),
        ("--tokens 0", "between 1 and 16777216, got 0"),
        ("--tokens 99999999999999999999", "between 1 and 16777216"),
        ("--tokens 16777216 --pairs 16777216", "at most 16777216 tokens can be planned"),
        ("--lengths 16777216,16777216", "at most 16777216 tokens can be planned"),
    ],
)
def test_the_command_refuses(capsys, given, message):
    with pytest.raises(SystemExit) as left:
        main(["plan", "--vocab", "97", "--hidden", "8", *given.split()])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plan_of_an_objective_with_a_state(capsys):
    given = "plan --tokens 100 --vocab 1000 --hidden 16 --device cpu --loss beta_dpo"
    assert main(given.split()) == 0
    assert "products: 4" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["5,a", "5,6,7", "5,-6", ""])
def test_lengths_that_are_no_pairs_are_named(capsys, given):
    with pytest.raises(SystemExit):
        main(["plan", f"--lengths={given}", "--vocab", "10", "--hidden", "4"])
    assert f"must be an even number of lengths such as 500,80, got {given!r}" in capsys.readouterr().err
