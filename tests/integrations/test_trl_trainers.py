"""TRL's own trainers, patched and not: the same losses, metrics and weights."""

import functools

import pytest

pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 or newer is not installed")

from spo_kernels.integrations.trl import patch_trl
from spo_kernels.integrations.trl_head import FusedHead

from .same_run import assert_same
from .tiny import Run

pytestmark = pytest.mark.usefixtures("trl_utils")

# trainer, model, settings; WPO's weights need log Σp²
RUNS = {
    "DPO llama": ("DPO", "llama", {"steps": 8}),
    "DPO gemma2, softcap": ("DPO", "gemma2", {"steps": 8}),
    "DPO cohere, logit scale": ("DPO", "cohere", {"steps": 8}),
    "DPO gpt2, WPO": ("DPO", "gpt2", {"steps": 8, "use_weighting": True}),
    "DPO llama, LoRA": ("DPO", "llama", {"adapter": "new"}),
    "KTO": ("KTO", "llama", {}),
    "SFT": ("SFT", "gpt2", {}),
    "GRPO, softcap and temperature": ("GRPO", "gemma2", {}),
    "RLOO": ("RLOO", "llama", {}),
}


def run(name, folder):
    trainer, kind, settings = RUNS[name]
    return Run(trainer, kind, folder, **settings)


def patched(name, folder):
    with patch_trl():
        return run(name, folder)


@pytest.mark.parametrize("name", RUNS)
def test_patched_equals_trl(tmp_path, monkeypatch, name):
    own, calls = FusedHead.apply, []

    @functools.wraps(own)
    def counted(*arguments):
        calls.append(arguments)
        return own(*arguments)

    monkeypatch.setattr(FusedHead, "apply", staticmethod(counted))
    trls = run(name, tmp_path)
    assert not calls
    ours = patched(name, tmp_path)
    assert len(calls) >= len(ours.losses)
    assert_same(ours, trls)


def test_a_lost_gradient_of_the_head_would_show(tmp_path, monkeypatch):
    own = FusedHead.apply

    @functools.wraps(own)
    def without(hidden, weight, *rest):
        return own(hidden, weight.detach(), *rest)

    monkeypatch.setattr(FusedHead, "apply", staticmethod(without))
    ours, trls = patched("DPO llama", tmp_path), run("DPO llama", tmp_path)
    with pytest.raises(AssertionError):
        assert_same(ours, trls)
