"""TRL's `ld_alpha` and `use_weighting`, run from the installed package on the same log-probabilities."""

import collections
import itertools
import types

import pytest
import torch

from spo_kernels import fused_spo_loss
from spo_kernels.extras.token_weights import ld_dpo_weights
from spo_kernels.losses import WPO, build_loss
from spo_kernels.testing import eager_logprob, random_batch

pytest.importorskip("trl", minversion="1.16")

PAIRS, TOKENS, VOCAB, HIDDEN = 3, 9, 37, 8
# α below is exact in float32, the dtype of weights
PROMPT, LENGTHS = 2, [6, 3, 4, 2, 6, 4]


def make_inputs():
    """Hidden states and head of policy and reference in float64, token ids and TRL's mask of completions."""
    policy, reference = (
        random_batch((2 * PAIRS, TOKENS), VOCAB, HIDDEN, dtype=torch.float64, spread=3.0, seed=seed) for seed in (1, 2)
    )
    place = torch.arange(TOKENS)
    mask = (place >= PROMPT) & (place < PROMPT + torch.tensor(LENGTHS)[:, None])
    return policy, reference, mask.long()


class Model(torch.nn.Module):
    """Answers as TRL's patched models do: what their fused head computes, one column per predicted token."""

    is_gradient_checkpointing = False

    def __init__(self, hidden, weight):
        super().__init__()
        self.hidden, self.weight = (torch.nn.Parameter(tensor.detach().clone()) for tensor in (hidden, weight))

    def forward(self, *, labels, **_):
        outputs = ("entropy", "log_sum_p2", "correct")
        logp, extras = eager_logprob(self.hidden, self.weight, labels, dtype=torch.float64, shift=True, outputs=outputs)
        return types.SimpleNamespace(
            log_probs=logp[:, 1:],
            entropy=extras["entropy"][:, 1:],
            log_sum_sq_probs=extras["log_sum_p2"][:, 1:],
            is_top1=extras["correct"][:, 1:],
            mean_logits=logp[:, 1:].detach(),
        )


def trl_loss(policy, reference, mask, **changes):
    """The loss of TRL's trainer, and the gradients of the policy's hidden states and head."""
    from trl import DPOTrainer

    trainer = types.SimpleNamespace(
        model=Model(policy.hidden, policy.weight),
        ref_model=Model(reference.hidden, reference.weight),
        accelerator=types.SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=types.SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_weights=[1.0],
        beta=0.1,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **{"ld_alpha": None, "use_weighting": False, "loss_types": ["sigmoid"]} | changes,
    )
    inputs = {"input_ids": policy.labels, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = DPOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False)
    loss.backward()
    return [loss.detach(), trainer.model.hidden.grad, trainer.model.weight.grad]


def ours(policy, reference, mask, objective, ld_alpha):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (policy.hidden, policy.weight)]
    labels = policy.labels.masked_fill(mask == 0, -100)
    weights = None if ld_alpha is None else ld_dpo_weights(labels, ld_alpha, shift=True)
    loss, _ = fused_spo_loss(
        *leaves,
        labels,
        loss=objective,
        ref_hidden=reference.hidden,
        ref_head=reference.weight,
        token_weights=weights,
        shift=True,
    )
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm"])
@pytest.mark.parametrize(
    ("ld_alpha", "use_weighting"), list(itertools.product([None, 0.0, 0.375, 1.0], [False, True])), ids=str
)
def test_same_loss_and_gradients(ld_alpha, use_weighting, loss_type):
    """IPO and sigmoid_norm divide by lengths, which are TRL's: token weights do not change them."""
    inputs = make_inputs()
    expected = trl_loss(*inputs, ld_alpha=ld_alpha, use_weighting=use_weighting, loss_types=[loss_type])
    objective = build_loss(loss_type, beta=0.1)
    found = ours(*inputs, WPO(objective, clamp=False) if use_weighting else objective, ld_alpha)
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-12)


def test_the_options_matter():
    """The comparison above could not fail if TRL ignored them here."""
    inputs = make_inputs()
    losses = [
        trl_loss(*inputs, ld_alpha=ld_alpha, use_weighting=use_weighting)[0].item()
        for ld_alpha, use_weighting in [(None, False), (0.375, False), (None, True)]
    ]
    assert max(losses) - min(losses) > 1e-2 and len(set(losses)) == 3
