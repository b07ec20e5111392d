"""Token log-probabilities of an LM head and losses of them, differentiable, without the `[N, V]` logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spo_kernels.engine.agreement import check_alike
from spo_kernels.engine.autograd import LogprobCall
from spo_kernels.engine.inputs import Execution, ModelInputs
from spo_kernels.engine.label_layout import LabelLayout
from spo_kernels.engine.renamed import refuses_old_names
from spo_kernels.engine.token_loss import TokenLoss, early_token_loss, token_losses
from spo_kernels.engine.tokens import Tokens
from spo_kernels.head import LMHead
from spo_kernels.sparsity import Sparsity

# outputs that are made only where a backward leaves something out, and their values elsewhere
_OF_SPARSITY = {"dropped_mass": 0.0, "kept_share": 1.0}


@refuses_old_names
def linear_logprob(
    hidden: Tensor,
    head: Tensor | LMHead,
    labels: Tensor,
    *,
    ignore_index: int | None = -100,
    shift: bool = False,
    outputs: Sequence[str] = (),
    sparsity: str | Sparsity = "exact",
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of labels under a linear head, without materialising the `[N, V]` logits.

    Equivalent PyTorch, with `softcap(x) = logit_softcap * tanh(x / logit_softcap)`::

        logits = softcap(head.logit_scale * (hidden @ head.weight.T + head.bias)).float()
        logp = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        logp = logp.masked_fill(labels == ignore_index, 0.0)

    Differentiable in hidden, weight and bias for any upstream gradient. Cost in products of size
    `[N, H] x [H, V]` over the N tokens that are not ignored: 1 without gradients, 2 with a frozen head,
    4 with a trained one.

    Args:
        hidden: `[..., H]` last hidden states; float32, bfloat16, float16 or float64.
        head: The head's weight `[V, H]`, same dtype, or an `LMHead` where there is a bias, a scale or a softcap, such
            as `LMHead.of(model)`. A weight that needs no gradient costs no product for it.
        labels: `[...]` int64 target ids in [0, V), or `ignore_index`. Ignored tokens take part in no product.
        ignore_index: Label of the positions that do not count; None: all count, and the host need not wait for a GPU
            to learn how many do.
        shift: Position t of `hidden` predicts `labels[..., t + 1]`. The result is aligned with `labels`, so
            its first position along the last dimension is 0.
        outputs: Any of "lse" (log-sum-exp of the logits), "correct" (bool: the label has the largest logit;
            ties count), "entropy" (nats), "log_sum_p2" (log Σ_v p_v²) and "mean_logit" (over the vocabulary), computed
            in the same pass. "lse", "entropy" and "log_sum_p2" are differentiable; a gradient that flows into them
            costs one more product.
            With `sparsity`, also "dropped_mass" (softmax mass left out of a token's gradient) and "kept_share"
            (of its vocabulary blocks); 0 and 1 where the backward is exact.
        sparsity: "exact", "certified", "unbiased" or a `Sparsity`: which blocks of the vocabulary the backward
            multiplies. Costs 1 + 3ρ products with a trained head and 1 + 2ρ with a frozen one, ρ the share kept,
            and up to 64 MiB beside the workspace for masses and lists.
        workspace_bytes: Bound on temporaries beside inputs, gradients and per-token values. Default 32 MiB
            on a CPU, 512 MiB on a GPU.
        backend: "torch", "cpp", "triton" or "cuda"; None takes SPO_BACKEND or else the best that is available.

    Returns:
        logp in float32 (float64 for float64 inputs), shaped like `labels`, 0 where ignored. With `outputs`:
        `(logp, extras)`, where `extras` maps each name to a tensor shaped like `labels`.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape, device or value.
        IndexError: A label is out of range.
        RuntimeError: The backend asked for is missing; or a double backward.

    The same inputs give the same bits run to run. Under `torch.autocast`, hidden, weight and bias are cast to
    its dtype, as `F.linear` does.
    """
    layout = LabelLayout(labels, ignore_index, shift)
    check_alike("linear_logprob", labels, head, hidden=hidden, outputs=outputs)
    model = ModelInputs.resolve(hidden, head, labels)
    execution = Execution.resolve(workspace_bytes, backend, model, sparsity)
    tokens = Tokens.all_of(layout, model.vocab)
    logp, extras = LogprobCall.of(model, tokens, shift, execution, outputs, outputs_carry_grad=True).run()
    if not outputs:
        return logp
    made = {name: torch.full_like(logp, value) for name, value in _OF_SPARSITY.items() if name in outputs}
    extras |= {name: value for name, value in made.items() if not extras[name].numel()}
    return logp, {name: extras[name] for name in outputs}


def linear_token_loss(
    hidden: Tensor,
    head: Tensor | LMHead,
    labels: Tensor,
    token_loss: TokenLoss,
    *,
    ignore_index: int | None = -100,
    shift: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A loss that is a sum over tokens of a function of their log-probabilities, in three products.

    Equivalent PyTorch::

        logp = linear_logprob(hidden, head, labels)
        at = (labels != ignore_index).nonzero(as_tuple=True)  # with `shift`, also without each row's first label
        loss = token_loss(logp[at], at).sum()

    A trained head costs that 4 products, since the upstream gradient comes when the logits are gone. Here groups of
    tokens, as many as the workspace holds, keep theirs until `token_loss` has said what they count. GRPO's surrogate,
    as a mean over tokens::

        def surrogate(logp, at):
            return clipped_surrogate(logp, old_logp[at], advantages[at]) / tokens

        loss, logp = linear_token_loss(hidden, weight, labels, surrogate)
        loss.backward()

    Args:
        hidden, head, labels, ignore_index, shift, backend: As in `linear_logprob`.
        token_loss: Called with log-probabilities `[n]` of some tokens, float32 (float64 for float64 inputs), and with
            the places of their labels, an index of tensors `[n]` for whatever has labels' shape; returns their losses
            `[n]`, by plain differentiable operations. It is called once a group, so no token's loss may look at
            another's log-probability; what it uses beside them must need no gradient. While a CUDA graph is recorded
            it is asked about ignored labels too, as 0; what it says of them counts nothing.
        workspace_bytes: As in `fused_spo_loss`. Where it holds too few tokens, and with a frozen head, float16, or
            under torch.compile, the expression above is what is computed: 4 products, or 2.

    Returns:
        The loss, 0-d, and the log-probabilities in labels' shape, detached, 0 where ignored. The gradients of three
        products are given out once: a second `backward()` is refused.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: As in `linear_logprob`; or `token_loss` does not give a loss
            for each token, uses something that needs a gradient, or gives losses that have none.
    """
    if not callable(token_loss):
        raise TypeError(f"token_loss must be a function, got {type(token_loss).__name__}")
    layout = LabelLayout(labels, ignore_index, shift)
    check_alike("linear_token_loss", labels, head, hidden=hidden)
    model = ModelInputs.resolve(hidden, head, labels)
    execution = Execution.resolve(workspace_bytes, backend, model)
    tokens = Tokens.all_of(layout, model.vocab)
    found = early_token_loss(model, tokens, shift, execution, token_loss)
    if found is not None:
        return found
    logp, _ = LogprobCall.of(model, tokens, shift, execution).run()
    at = tokens.counted.nonzero(as_tuple=True)
    return token_losses(token_loss, logp[at], at).sum(), logp.detach()
