"""WPO's detached weight: from the policy's own softmax, through every wrapper, on every path that it can take."""

import dataclasses

import pytest
import torch

from spo_kernels import fused_spo_loss
from spo_kernels.losses import DPO, SPO, WPO, PairLogps, build_loss
from spo_kernels.preference import plan as paths
from spo_kernels.testing import TensorMeter, eager_logprob, peaked_batch, random_batch

PAIRS, TOKENS, VOCAB, HIDDEN = 4, 6, 41, 10


def make_batch(dtype=torch.float64):
    """Sampled labels; the likeliest ones in pair 0, whose weight exceeds 1; uniform ones in pairs 1 and 3."""
    batch = peaked_batch(2 * PAIRS, TOKENS, VOCAB, HIDDEN, dtype=dtype)
    other = random_batch((2 * PAIRS, TOKENS), VOCAB, HIDDEN, seed=4)
    for row in (1, 3, 1 + PAIRS):
        batch.labels[row] = other.labels[row]
    for row in (0, PAIRS):
        batch.labels[row] = (batch.hidden[row] @ batch.weight.T).argmax(-1)
    batch.labels[0, 4:] = -100
    batch.labels[PAIRS + 2, :2] = -100
    return batch


def expected(batch, clamp, token_weights=1.0, penalty=0.0):
    """Loss, gradients and weights from float64 logits, β 0.1, no reference."""
    leaves = {name: getattr(batch, name).double().requires_grad_() for name in ("hidden", "weight")}
    logp, extras = eager_logprob(*leaves.values(), batch.labels, dtype=torch.float64, outputs=("log_sum_p2",))
    lengths = (batch.labels != -100).sum(-1)
    with torch.no_grad():
        weights = ((logp - extras["log_sum_p2"]).sum(-1) / lengths).view(2, -1).sum(0).exp()
        weights = weights.clamp_max(1.0) if clamp else weights
    chosen, rejected = (token_weights * logp).sum(-1).chunk(2)
    losses = weights * torch.nn.functional.softplus(-0.1 * (chosen - rejected)) - penalty * chosen / lengths[:PAIRS]
    losses.mean().backward()
    return [losses.mean().detach(), leaves["hidden"].grad, leaves["weight"].grad], weights


def run(batch, **options):
    leaves = [getattr(batch, name).detach().clone().requires_grad_() for name in ("hidden", "weight")]
    loss, metrics = fused_spo_loss(*leaves, batch.labels, **options)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)], metrics


BASE = DPO(beta=0.1, reference_free=True)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("layout", ["padded", "packed", "shift"])
def test_value_and_gradients(clamp, layout):
    batch = make_batch()
    truth, weights = expected(batch, clamp)
    assert (weights < 0.5).any() and (weights == 1.0 if clamp else weights > 1.0).any()
    options = {"loss": WPO(BASE, clamp=clamp), "backend": "torch"}
    if layout == "packed":
        options["cu_seqlens"] = torch.arange(2 * PAIRS + 1) * TOKENS
        batch = dataclasses.replace(batch, hidden=batch.hidden.flatten(0, 1), labels=batch.labels.flatten())
        truth[1] = truth[1].flatten(0, 1)
    if layout == "shift":
        options["shift"] = True
        edge = torch.zeros(2 * PAIRS, 1)
        batch = dataclasses.replace(
            batch,
            hidden=torch.cat([batch.hidden, edge[..., None].expand(-1, -1, HIDDEN)], 1),
            labels=torch.cat([edge.long(), batch.labels], 1),
        )
        truth[1] = torch.cat([truth[1], edge[..., None].expand(-1, -1, HIDDEN)], 1)
    found, _ = run(batch, **options)
    for value, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-11, atol=1e-13)


def test_float32(backend):
    batch = make_batch(torch.float32)
    truth, _ = expected(batch, True)
    found, _ = run(batch, loss=WPO(BASE), backend=backend)
    for value, exact in zip(found, truth, strict=True):
        error = (value.double() - exact).abs().max()
        assert error <= 16 * torch.finfo(torch.float32).eps * (1 + exact.abs().max())


def test_token_weights_leave_the_weight_alone():
    """As in TRL with ld_alpha and use_weighting: a zero weight hides a token from the sums, not from the weight."""
    batch = make_batch()
    token_weights = torch.ones(batch.labels.shape)
    token_weights[:, 3:] = 0.0
    truth, _ = expected(batch, True, token_weights)
    found, _ = run(batch, loss=WPO(BASE), token_weights=token_weights, backend="torch")
    for value, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-11, atol=1e-13)


def test_spo_around_wpo():
    batch = make_batch()
    truth, _ = expected(batch, True, penalty=0.5)
    objective = SPO(WPO(BASE), weight=0.5)
    assert objective.token_outputs == ("logp", "log_sum_p2") and SPO(BASE).token_outputs == ()
    found, _ = run(batch, loss=objective, backend="torch")
    for value, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-11, atol=1e-13)
    assert build_loss("spo", base=WPO(DPO(beta=0.3))).beta == 0.3
    assert build_loss("wpo", beta=0.3, clamp=False) == WPO(DPO(beta=0.3), clamp=False)


def test_metrics_do_not_depend_on_it():
    batch = make_batch()
    _, plain = run(batch, loss=BASE, token_metrics=True)
    _, weighted = run(batch, loss=WPO(BASE), token_metrics=True)
    for name in plain.keys() - {"loss"}:
        torch.testing.assert_close(weighted[name], plain[name])


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_packed_path(monkeypatch, weighted, groups):
    """Three products: the weight is found while a pair's logits are kept; all pairs at once, or one after the other."""
    batch = make_batch()
    token_weights = torch.ones(batch.labels.shape)
    token_weights[:, 3:] = 0.0 if weighted else 1.0
    truth, _ = expected(batch, True, token_weights)
    if groups > 1:
        several = paths.PairProblem.groups
        monkeypatch.setattr(paths.PairProblem, "groups", lambda self, rows: several(self, max(self.pair_tokens)))
    with TensorMeter() as meter:
        options = dict(token_weights=token_weights if weighted else None, backend="torch")
        found, _ = run(batch, loss=WPO(BASE), path="packed", **options)
    for value, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-11, atol=1e-13)
    assert meter.flops == 3 * 2 * int((batch.labels != -100).sum()) * VOCAB * HIDDEN


def test_no_factorised_path():
    with pytest.raises(
        ValueError, match="path = 'factorised' cannot be taken: its objective needs all tokens of a pair"
    ):
        run(make_batch(), loss=WPO(BASE), path="factorised")


def test_empty_responses_and_batches():
    batch = make_batch()
    batch.labels[[0, PAIRS + 1]] = -100
    found, _ = run(batch, loss=WPO(BASE))
    assert all(value.isfinite().all() for value in found)
    empty = random_batch((0, 3), VOCAB, HIDDEN)
    assert run(empty, loss=WPO(BASE))[0][0] == 0


def test_non_finite_weights_show():
    ones = torch.ones(2)
    lengths = torch.tensor([3, 3])
    inputs = {f"{side}_{name}": ones for side in ("chosen", "rejected") for name in ("logp", "log_sum_p2")}
    inputs["chosen_logp"] = torch.tensor([torch.nan, -5.0])
    losses = WPO(BASE)(PairLogps(-ones, -ones, None, None, lengths, lengths, inputs=inputs))
    assert losses[0].isnan() and losses[1].isfinite()
    with pytest.raises(ValueError, match=r"WPO needs pair_inputs\['chosen_logp'\]"):
        WPO(BASE)(PairLogps(-ones, -ones, None, None, lengths, lengths))


def test_no_logits():
    tokens, vocab = 128, 4096
    batch = random_batch((4, tokens), vocab, 16)
    leaves = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    with TensorMeter() as meter:
        loss, _ = fused_spo_loss(*leaves, batch.labels, loss=WPO(BASE), workspace_bytes=1 << 20, backend="torch")
        loss.backward()
    assert meter.peak < 4 * tokens * vocab * 4 / 2 and meter.largest <= 1 << 20


def test_bad_input():
    with pytest.raises(TypeError, match=r"base must be an objective .*, got 'dpo'; build_loss\('dpo'\) makes one"):
        WPO(base="dpo")
    with pytest.raises(TypeError, match="clamp must be True or False, got 1"):
        WPO(clamp=1)

    class Wrong(DPO):
        token_outputs = ("logits",)

    with pytest.raises(ValueError, match=r"token_outputs must be one of .*, got 'logits'"):
        run(make_batch(), loss=Wrong(reference_free=True))
