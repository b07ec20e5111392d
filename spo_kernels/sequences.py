"""`sequence_logps`: from token log-probabilities to sequence sums, for padded and for packed batches."""

from __future__ import annotations

from torch import Tensor

from spo_kernels.engine.agreement import check_alike
from spo_kernels.engine.autograd import LogprobCall
from spo_kernels.engine.checks import check_token_weights
from spo_kernels.engine.inputs import Execution, ModelInputs
from spo_kernels.engine.label_layout import LabelLayout
from spo_kernels.engine.renamed import refuses_old_names
from spo_kernels.engine.tokens import Tokens
from spo_kernels.head import LMHead, sequence_group


@refuses_old_names
def sequence_logps(
    hidden: Tensor,
    head: Tensor | LMHead,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int | None = -100,
    shift: bool = False,
    token_weights: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each sequence: `linear_logprob(...)` summed over the tokens that count.

    Equivalent PyTorch, padded: `(token_weights * linear_logprob(hidden, head, labels, ...)).sum(-1)`.

    Args:
        hidden: `[S, T, H]` padded, or `[N, H]` packed with `cu_seqlens`.
        head: `[V, H]` weight, or an `LMHead`.
        labels: `[S, T]` or `[N]` int64.
        cu_seqlens: `[S + 1]` int32 or int64 bounds of the packed sequences, from 0 to N; on a GPU, better given on
            the CPU, where they are checked and need not be waited for.
        ignore_index, shift, workspace_bytes, backend: As in `linear_logprob`; with `shift`, packed sequences do not
            see each other.
        token_weights: What each label's log-probability counts in the sum, shaped like `labels`; finite, taken as
            constants; 1 where None. Tokens of weight 0 take part in no product.

    Returns:
        `[S]` float32 (float64 for float64 inputs), nats; differentiable.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: As in `linear_logprob`.
    """
    layout = LabelLayout(labels, ignore_index, shift, cu_seqlens, sequence_group(head))
    layout.check_sequences("S, T")
    check_alike("sequence_logps", labels, head, hidden=hidden, token_weights=token_weights)
    model = ModelInputs.resolve(hidden, head, labels)
    execution = Execution.resolve(workspace_bytes, backend, model)
    if token_weights is not None:
        check_token_weights("token_weights", token_weights, labels)
        token_weights = token_weights.detach()
        tokens = Tokens.find(layout, layout.counted() & (token_weights != 0), model.vocab)
    else:
        tokens = Tokens.all_of(layout, model.vocab)
    logp, _ = LogprobCall.of(model, tokens, shift, execution).run()
    return layout.sum(logp, token_weights)
