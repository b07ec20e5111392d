"""What `patch_trl` replaces, gives back and refuses."""

import functools
import sys

import pytest
import torch

from spo_kernels.integrations import trl as integration
from spo_kernels.integrations.trl import patch_trl, unpatch_trl
from spo_kernels.integrations.trl_head import FusedHead
from spo_kernels.integrations.trl_seam import COMPACTS, HEAD, TESTED, find_seam

NAMES = (HEAD, COMPACTS)


def state(utils):
    return [getattr(utils, name) for name in NAMES]


def test_the_installed_trl_is_known(trl_utils):
    """Fails where a newer TRL moved its fused head, or has not been tried: see docs/trl.md."""
    module, replacements = find_seam()
    assert module is trl_utils and set(replacements) == set(NAMES)
    assert integration.trl_version() in TESTED


def test_replaces_and_gives_back(trl_utils):
    before = state(trl_utils)
    patch = patch_trl()
    assert trl_utils._ChunkedLogProbFunction is FusedHead
    assert patch.new and all(name in str(patch) for name in NAMES) and patch.version in str(patch)
    unpatch_trl()
    assert state(trl_utils) == before
    unpatch_trl()
    assert state(trl_utils) == before


def test_twice_is_once(trl_utils):
    before = state(trl_utils)
    patch_trl()
    inside = state(trl_utils)
    again = patch_trl()
    assert not again.new and state(trl_utils) == inside
    unpatch_trl()
    assert state(trl_utils) == before


def test_context_manager(trl_utils):
    before = state(trl_utils)
    with pytest.raises(KeyError), patch_trl() as patch:
        assert patch.new and trl_utils._ChunkedLogProbFunction is FusedHead
        with patch_trl():
            pass
        assert trl_utils._ChunkedLogProbFunction is FusedHead  # the outer one holds
        raise KeyError
    assert state(trl_utils) == before


class OtherParameters(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        return hidden


class OtherOutputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=("entropy", "is_top1"),
    ):
        return hidden


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (HEAD, None, "is None, not an autograd function"),
        (HEAD, OtherParameters, "takes hidden, weight, targets, not hidden, weight, bias"),
        (HEAD, OtherOutputs, r"offers the outputs \('entropy', 'is_top1'\)"),
        ("add_fused_lm_head", lambda model: None, f"does not call {HEAD}"),
        ("add_fused_lm_head", None, f"does not call {HEAD}"),
        (COMPACTS, lambda device, other: True, "takes device, other"),
    ],
)
def test_unknown_internals_are_refused(trl_utils, monkeypatch, name, value, message):
    monkeypatch.setattr(trl_utils, name, value)
    before = state(trl_utils)
    with pytest.raises(RuntimeError, match=message) as error:
        patch_trl()
    assert integration.trl_version() in str(error.value) and " and ".join(TESTED) in str(error.value)
    assert state(trl_utils) == before


def test_untested_version_that_looks_the_same_is_patched_with_a_warning(trl_utils, monkeypatch):
    monkeypatch.setattr(integration, "trl_version", lambda: "99.0")
    with pytest.warns(UserWarning, match=r"TRL 99\.0 .* tested with TRL 1\.15\.0 and 1\.16\.0 only"):
        assert patch_trl().new


def test_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs TRL \(1\.15\.0 or 1\.16\.0\)"):
        patch_trl()


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_only_labelled_tokens_reach_the_head(trl_utils, monkeypatch, kept):
    """TRL 1.16 scores all positions on a CPU. Without any label the loss is a zero with zero gradients."""
    tiny = pytest.importorskip("integrations.tiny")
    own, rows = FusedHead.apply, []

    @functools.wraps(own)
    def counted(hidden, *rest):
        rows.append(len(hidden))
        return own(hidden, *rest)

    monkeypatch.setattr(FusedHead, "apply", staticmethod(counted))
    ids = torch.randint(tiny.VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(20) >= 20 * kept, -100)
    results = []
    for patched in (False, True):
        model = tiny.make_model("llama")
        trl_utils.add_fused_lm_head(model)
        if patched:
            patch_trl()
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        out.loss.backward()
        results.append([out.loss.detach(), out.log_probs.detach(), model.lm_head.weight.grad])
    assert rows == [(labels[:, 1:] != -100).sum()]
    for ours, trls in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, trls)
