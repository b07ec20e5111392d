"""The pair_loss kernels of both GPU backends against the losses' own definition in float64."""

import os

import pytest
import torch
from tile_inputs import close

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from spo_kernels import fused_spo_loss
from spo_kernels.backends.pair_form import PairForm, PairTensors
from spo_kernels.engine.label_layout import LabelLayout
from spo_kernels.losses import DPO, SPO, PairLogps
from spo_kernels.preference import plan as paths
from spo_kernels.preference.given import Given
from spo_kernels.preference.kernel import PairKernel, kernel_form
from spo_kernels.preference.outcome import Outcome
from spo_kernels.preference.resolve import resolve_batch
from spo_kernels.testing import random_batch

OBJECTIVES = {
    "dpo": DPO(beta=0.3),
    "dpo-free": DPO(beta=0.3, reference_free=True),
    "spo": SPO(DPO(beta=0.2), weight=0.7),
    "spo-sum": SPO(DPO(beta=0.2), weight=0.01, normalization="sum"),
    "hinge": SPO(penalty="hinge", epsilon=0.1),
    "hinge-input": SPO(penalty="hinge", value="input"),
}


def given_pairs(layout, tokens=37, pairs=3):
    torch.manual_seed(7)
    labels = torch.randint(9, (2 * pairs, tokens))
    labels[torch.rand(labels.shape) < 0.3] = -100
    labels[1] = -100
    cu_seqlens = None
    if layout != "padded":
        lengths = torch.randint(1, tokens, (2 * pairs,))
        lengths[4] = 0
        dtype = torch.int32 if layout == "int32" else torch.int64
        cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(dtype)
        labels = labels.flatten()[: int(cu_seqlens[-1])]
    logp = -2.0 * torch.rand(labels.shape)
    return logp.masked_fill(labels == -100, 0.0), labels, cu_seqlens


@pytest.mark.parametrize(("layout", "reduction"), [("padded", "mean"), ("int32", "sum"), ("int64", "mean")])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_pair_loss_is_the_losses_definition(backend, layout, objective, reduction):
    """Loss, metrics and gradient of the fast path against the objective itself in float64."""
    logp, labels, cu_seqlens = given_pairs(layout)
    pairs = 3
    layout = LabelLayout(labels, -100, False, cu_seqlens)
    reference = layout.sum(logp) + torch.randn(2 * pairs)
    value = torch.tensor([0.5, 1.0, 3.0])
    truth = logp.double().requires_grad_()
    sums, lengths = layout.sum(truth), layout.count(layout.counted())
    losses = objective(
        PairLogps(
            sums[:pairs],
            sums[pairs:],
            reference[:pairs].double(),
            reference[pairs:].double(),
            lengths[:pairs],
            lengths[pairs:],
            {"spo_value": value.double()},
        )
    )
    expected = losses.mean() if reduction == "mean" else losses.sum()
    (1.5 * expected).backward()

    ours = logp.clone().requires_grad_()
    batch = resolve_batch(
        objective,
        layout,
        Given(torch.zeros(*labels.shape, 1), torch.zeros(9, 1)),
        Given(None, None, logps=reference),
        {"spo_value": value},
        reduction=reduction,
        token_metrics=False,
        sparsity="exact",
        workspace_bytes=None,
        backend=backend,
    )
    loss, summary = PairKernel.of(batch).loss(ours, batch)
    metrics = Outcome(loss, summary).metrics(batch.layout, batch.lengths, pair_logps=True)
    (1.5 * loss).backward()
    close(loss.detach(), expected.detach(), 1e-6)
    close(metrics["loss"], losses.detach().mean(), 1e-6)
    close(ours.grad, truth.grad.masked_fill(labels == -100, 0.0), 1e-6)
    rewards = objective.beta * (sums.detach() - reference.double())
    close(metrics["rewards/chosen"], rewards[:pairs].mean(), 1e-6)
    close(metrics["rewards/margins"], (rewards[:pairs] - rewards[pairs:]).mean(), 1e-6)
    close(metrics["rewards/accuracies"], (rewards[:pairs] > rewards[pairs:]).double().mean(), 1e-6)
    close(metrics["logps/rejected"], sums[pairs:].detach().mean(), 1e-6)
    close(metrics["pair_logps"], sums.detach(), 1e-6)


@pytest.mark.parametrize("margin", [-200.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 90.0, 200.0, torch.nan])
def test_pair_loss_of_extreme_margins(kernels, margin):
    """-log sigmoid keeps its digits where e^-z is far below 1."""
    logp = torch.tensor([[margin], [0.0]])
    labels = torch.zeros(2, 1, dtype=torch.int64)
    form = PairForm(beta=1.0, use_reference=False)
    summary, coefficients = kernels.pair_loss(PairTensors(logp, labels, None, None, None, -100), form, 1.0)
    z = torch.tensor(margin, dtype=torch.float64)
    expected = torch.stack([-torch.nn.functional.logsigmoid(z), -torch.sigmoid(-z)])
    assert torch.allclose(
        torch.stack([summary[0, 0], coefficients[0, 0]]).double(), expected, 1e-6, 1e-37, equal_nan=True
    )


def test_bad_segment_bounds_read_nothing_else(kernels):
    """On a GPU their values are not looked at before the launch."""
    logp, labels = torch.rand(6), torch.zeros(6, dtype=torch.int64)
    cu_seqlens = torch.tensor([-5, 3, 10**12])
    form = PairForm(beta=1.0, use_reference=False)
    summary, _ = kernels.pair_loss(PairTensors(logp, labels, cu_seqlens, None, None, -100), form, 1.0)
    close(summary[5:, 0], torch.stack([logp[:3].sum(), logp[3:].sum()]), 1e-6)


def test_only_the_kernels_own_objectives_take_the_fast_path():
    class Other(DPO):
        pass

    assert kernel_form(DPO(), True, False) is not None
    assert kernel_form(DPO(), False, False) is None
    assert kernel_form(DPO(reference_free=True), False, False) is not None
    assert kernel_form(SPO(penalty="hinge", value="input"), True, False) is None
    assert kernel_form(Other(), True, True) is None
    assert kernel_form(SPO(Other()), True, True) is None
    assert kernel_form(lambda pairs: pairs.chosen, True, True) is None


@pytest.mark.parametrize("path", [None, "two_pass", "packed", "factorised"])
@pytest.mark.parametrize(
    ("loss", "weighted", "packed"),
    [("dpo", False, True), ("spo", False, False), (SPO(penalty="hinge"), False, True), ("spo", True, False)],
    ids=["dpo packed", "spo", "hinge packed", "weighted"],
)
def test_fused_spo_loss(backend, monkeypatch, loss, packed, path, weighted):
    """The whole call on both backends: the same loss, metrics and gradients; the kernel knows no token weights."""
    if path == "packed":  # each pair is then a group of its own
        groups = paths.PairProblem.groups
        monkeypatch.setattr(paths.PairProblem, "groups", lambda self, rows: groups(self, max(self.pair_tokens)))
    batch = random_batch((4, 9), 70, 8, ignored=0.2)
    cu_seqlens = torch.tensor([0, 9, 20, 20, 36]) if packed else None
    shape = (36,) if packed else (4, 9)
    token_weights = torch.linspace(0, 2, 36).reshape(shape) if weighted else None
    results = {}
    for name in ("torch", backend):
        hidden = batch.hidden.reshape(*shape, 8).clone().requires_grad_()
        weight = batch.weight.clone().requires_grad_()
        value, metrics = fused_spo_loss(
            hidden,
            weight,
            batch.labels.reshape(shape),
            loss=loss,
            ref_logps=torch.linspace(-40, -20, 4),
            cu_seqlens=cu_seqlens,
            token_weights=token_weights,
            token_metrics=True,
            shift=True,
            path=path,
            backend=name,
        )
        value.backward()
        results[name] = {"loss": value.detach(), **metrics, "dh": hidden.grad, "dw": weight.grad}
    assert results["torch"].keys() == results[backend].keys()
    for name, expected in results["torch"].items():
        assert results[backend][name].shape == expected.shape, name
        close(results[backend][name], expected, 2e-5)
