"""FusedPreferenceModel under FSDP2 on two processes against one process with all pairs."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from spo_kernels.integrations.transformers import FusedPreferenceModel
from tests.integrations.fsdp_ranks import CASES, ONLINE, PROCESSES, WATCHDOG, batch_of, precomputed, train
from tests.integrations.test_transformers import build
from tests.processes import found_by


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by("tests.integrations.fsdp_ranks", PROCESSES, tmp_path_factory.mktemp("ranks"), WATCHDOG)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(found: dict[str, Any], name: str) -> None:
    """Loss, gradients, and weights after four steps of AdamW, relative to how far they moved."""
    kind, make, _, _ = CASES[name]
    ours, policy = found[name], make(kind, None)
    start = {key: p.detach().clone() for key, p in policy.named_parameters()}
    expected = train(policy, batch_of(slice(0, 4), name in ONLINE))
    torch.testing.assert_close(ours["losses"], expected["losses"], rtol=1e-5, atol=1e-6)
    for key, gradient in expected["gradients"].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours["gradients"][key], gradient, rtol=1e-4, atol=1e-5 * scale, msg=key)
        moved = (expected["weights"][key] - start[key]).norm()
        assert moved > 0 and (ours["weights"][key] - expected["weights"][key]).norm() <= 1e-3 * moved, key


def test_mixed_precision_leaves_the_references_sums_alone(found: dict[str, Any]) -> None:
    """Of -300.123 and the like, every bit; those that were rounded before are refused."""
    case = found["mixed precision"]
    assert torch.equal(case["given"], case["expected"])
    assert bool(case["gradient"].isfinite().all()) and bool(case["gradient"].any())
    assert "TypeError: ref_logps must be float32 or float64, got torch.bfloat16" in case["rounded"]


def test_a_streamed_head_is_clipped_saved_and_resumed(found: dict[str, Any]) -> None:
    """Beside one process with all pairs: accumulated, clipped, a step; and, of a process, no more than its rows."""
    case, policy = found["of streamed"], FusedPreferenceModel(build("llama"), "dpo")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    policy(**batch_of(slice(0, 4)))[0].backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.1)
    optimizer.step()
    torch.testing.assert_close(case["norm"], norm, rtol=1e-5, atol=0)
    expected = policy.model.state_dict()
    assert case["saved"].keys() == expected.keys() and case["rows"] == 31
    for key, value in expected.items():
        assert type(case["saved"][key]) is torch.Tensor
        torch.testing.assert_close(case["saved"][key], value, rtol=1e-4, atol=2e-5, msg=key)
    assert case["resumed"]


def test_logits_of_a_streamed_head(found: dict[str, Any]) -> None:
    """Its own forward gathers."""
    case, model, ids = found["of streamed"], build("llama"), torch.tensor([[1, 5, 9, 30]])
    torch.testing.assert_close(case["logits"], model(input_ids=ids).logits.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(case["generated"], model.generate(ids, max_new_tokens=4, do_sample=False))


def test_a_streamed_head_in_mixed_precision(found: dict[str, Any]) -> None:
    ours, policy = found["of streamed"]["half"], FusedPreferenceModel(build("llama"), "dpo")
    policy(**batch_of(slice(0, 4)))[0].backward()
    expected = policy.model.lm_head.weight.grad
    assert ours.dtype == torch.float32 and bool((ours - expected).norm() < 0.05 * expected.norm())


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "adapted": "LlamaForCausalLM: the head carries an adapter: leave it out of the adapter's targets",
        "grid": "mesh must have one dimension, the processes that share the head, got 2",
        "split": "LlamaForCausalLM: the head is split already: call shard_head before fully_shard",
        "twice": "LlamaForCausalLM: the head is split already",
        "adapted later": "LlamaForCausalLM: the head carries an adapter, and shard_head has split it",
    }.items(),
)
def test_heads_that_are_not_split(found: dict[str, Any], name: str, said: str) -> None:
    assert said in found["refused"][f"shard, {name}"]


def test_precomputed_reference_of_a_sharded_model(found: dict[str, Any]) -> None:
    for sums in found["precomputed"]:
        torch.testing.assert_close(sums, precomputed(None), rtol=1e-6, atol=1e-6)


def test_what_would_go_wrong_in_silence_is_refused(found: dict[str, Any]) -> None:
    case = found["refused"]
    for name in ("first", "later"):
        assert "RuntimeError: the forward of a module that DistributedDataParallel wraps" in case[name]
    assert "RuntimeError: FSDPLlamaForCausalLM: fully_shard made it one group" in case["one group"]
    assert case["ddp"] == case["no_grad"] == case["one group, no_grad"] == "no error"
