"""What fused_spo_loss is compared with: the formulas spelled out once more, on float64 sums from full logits."""

import pytest
import torch

from spo_kernels import LMHead, fused_spo_loss
from spo_kernels.losses import DPO, SPO
from spo_kernels.testing import Batch, eager_logprob, random_batch, worst_error

METRICS = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
}
PAIRS, TOKENS, VOCAB, HIDDEN = 3, 7, 43, 16


def logsigmoid(x):
    return -torch.log1p(torch.exp(-x))


# Each objective, and the same thing as a function of
# p_w, p_l, q_w, q_l (sums), n_w (tokens) and v (the lower level's value), in float64.
FORMULAS = {
    "dpo": (DPO(), lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.1 * (p_w - q_w - (p_l - q_l)))),
    "dpo-beta": (DPO(beta=0.7), lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.7 * (p_w - q_w - (p_l - q_l)))),
    "dpo-reference-free": (
        DPO(beta=0.3, reference_free=True),
        lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.3 * (p_w - p_l)),
    ),
    "spo": (SPO(), lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.1 * (p_w - q_w - p_l + q_l)) - p_w / n_w),
    "spo-sum": (
        SPO(DPO(beta=0.5), weight=0.2, normalization="sum"),
        lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.5 * (p_w - q_w - p_l + q_l)) - 0.2 * p_w,
    ),
    "spo-reference-free": (
        SPO(DPO(beta=0.5, reference_free=True), weight=0.2),
        lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.5 * (p_w - p_l)) - 0.2 * p_w / n_w,
    ),
    "hinge-reference": (
        SPO(DPO(), weight=2.0, penalty="hinge", epsilon=0.05),
        lambda p_w, p_l, q_w, q_l, n_w, v: (
            -logsigmoid(0.1 * (p_w - q_w - p_l + q_l)) + 2 * (-p_w / n_w + q_w / n_w - 0.05).clamp(min=0)
        ),
    ),
    "hinge-reference-sum": (
        SPO(DPO(), weight=2.0, penalty="hinge", epsilon=0.3, normalization="sum"),
        lambda p_w, p_l, q_w, q_l, n_w, v: (
            -logsigmoid(0.1 * (p_w - q_w - p_l + q_l)) + 2 * (-p_w + q_w - 0.3).clamp(min=0)
        ),
    ),
    "hinge-input": (
        SPO(DPO(), penalty="hinge", value="input"),
        lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.1 * (p_w - q_w - p_l + q_l)) + (-p_w / n_w - v).clamp(min=0),
    ),
    "users-own": (
        lambda pairs: (pairs.chosen / pairs.chosen_lengths - pairs.rejected / 7 - 1).square(),
        lambda p_w, p_l, q_w, q_l, n_w, v: (p_w / n_w - p_l / 7 - 1) ** 2,
    ),
}
each_objective = pytest.mark.parametrize(("objective", "formula"), FORMULAS.values(), ids=FORMULAS)


def make_batch(dtype=torch.float32, **options):
    batch = random_batch((2 * PAIRS, TOKENS), VOCAB, HIDDEN, dtype=dtype, ignored=0.25, **options)
    batch.labels[:, 1] = 3  # every sequence has a token
    return batch


def make_reference(batch):
    """Near the policy: each hinge is on for some pairs and off for others, and so is each accuracy."""
    return oracle_sums(batch).detach().float() + torch.tensor([1.5, -2.0, 0.5, -0.5, 1.0, 3.0])


def make_value():
    return torch.tensor([3.0, 4.0, 5.0])


def split(options):
    """What belongs to a head, and the rest."""
    transform = {name: value for name, value in options.items() if name.startswith("logit_")}
    return transform, {name: value for name, value in options.items() if name not in transform}


def oracle_sums(batch, **options):
    doubles, (transform, options) = batch.to(torch.float64), split(options)
    logp = eager_logprob(doubles.hidden, doubles.head(**transform), batch.labels, dtype=torch.float64, **options)
    return logp.sum(-1)


def expected(formula, batch, reference, *, value=None, reduction="mean", **options):
    """Loss, gradients and metrics' ingredients from float64 logits."""
    doubles, (transform, options) = batch.to(torch.float64), split(options)
    leaves = {name: getattr(doubles, name).detach().clone().requires_grad_() for name in ("hidden", "weight")}
    head = LMHead(leaves["weight"], doubles.bias, **transform)
    logp = eager_logprob(leaves["hidden"], head, batch.labels, dtype=torch.float64, **options)
    counted = batch.labels != options.get("ignore_index", -100)
    if options.get("shift"):
        counted[:, 0] = False
    p_w, p_l = logp.sum(-1).chunk(2)
    q_w, q_l = (0 * p_w.detach(),) * 2 if reference is None else reference.double().chunk(2)
    n_w, _ = counted.sum(-1).chunk(2)
    per_pair = formula(p_w, p_l, q_w, q_l, n_w, None if value is None else value.double())
    loss = {"mean": per_pair.mean, "sum": per_pair.sum, "none": lambda: per_pair}[reduction]()
    loss.sum().backward()
    return loss.detach(), leaves["hidden"].grad, leaves["weight"].grad, (p_w.detach(), p_l.detach(), q_w, q_l)


def run(batch, **options):
    transform, options = split(options)
    leaves = {name: getattr(batch, name).detach().clone().requires_grad_() for name in ("hidden", "weight")}
    head = LMHead(leaves["weight"], batch.bias, **transform)
    loss, metrics = fused_spo_loss(leaves["hidden"], head, batch.labels, **options)
    loss.sum().backward()
    return loss.detach(), leaves["hidden"].grad, leaves["weight"].grad, metrics


def assert_near(found, truth, name, dtype=torch.float32):
    """Within eight roundings of the largest element: sums of a few dozen float32 terms."""
    assert found.shape == truth.shape, name
    scale = 1 + (truth.abs().max().item() if truth.numel() else 0.0)
    error = worst_error(found, truth)
    assert error <= 16 * scale * torch.finfo(dtype).eps, f"{name}: error {error:.3g}, largest {scale:.3g}"


def pack(batch, *, keep_ignored):
    """Rows of a padded batch end to end, with or without the ignored ones, and the bounds."""
    keep = torch.ones_like(batch.labels, dtype=torch.bool) if keep_ignored else batch.labels != -100
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(-1).cumsum(0)])
    return Batch(batch.hidden[keep], batch.weight, batch.labels[keep], batch.bias), bounds, keep


OPTIONS = {
    "shift": dict(shift=True),
    "scale-and-softcap": dict(logit_scale=0.5, logit_softcap=3.0),
    "ignore-index": dict(ignore_index=3),
}
