"""Heads that tensor parallelism splits, by transformers' plan or torch's styles, against the whole model."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tests.integrations.test_transformers import build
from tests.integrations.tp_ranks import CASES, SHARDED, WATCHDOG, result
from tests.processes import found_by

VOCAB = 61


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    world = request.param
    return world, found_by("tests.integrations.tp_ranks", world, tmp_path_factory.mktemp("tp"), WATCHDOG)


def test_a_split_head_gives_the_whole_ones_loss_and_gradients(found: tuple[int, dict[str, Any]]) -> None:
    """No process holds more than its rows; with FSDP2 over the mesh's other dimension too."""
    world, cases = found[0], {name: case for name, case in found[1].items() if name != "refused"}
    assert cases.keys() == (CASES if world == 2 else SHARDED).keys()
    for name, (kind, _, use) in (CASES if world == 2 else SHARDED).items():
        expected, ours = result(*use(build(kind), None)), cases[name]
        assert ours["rows"] == VOCAB // 2 + 1, name
        torch.testing.assert_close(ours["loss"], expected["loss"], rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(ours["metrics"], expected["metrics"], rtol=1e-5, atol=1e-6, msg=name)
        assert ours["gradients"].keys() == expected["gradients"].keys(), name
        for key, gradient in expected["gradients"].items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                ours["gradients"][key], gradient, rtol=0, atol=2e-6 * scale, msg=f"{name}, {key}"
            )


def test_a_group_of_its_own_is_refused(found: tuple[int, dict[str, Any]]) -> None:
    """Where torch's hook on the split head's output would be given the loss."""
    world, cases = found
    if world == 4:
        assert (
            "RuntimeError: LlamaForCausalLM: the head is split by parallelize_module and in a group" in cases["refused"]
        )
