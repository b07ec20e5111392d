"""`linear_kl`: KL divergence of a policy's next-token distributions from a reference's, without `[N, V]` logits."""

from __future__ import annotations

from torch import Tensor

from spo_kernels.engine.agreement import check_alike
from spo_kernels.engine.divergence_ops import kl_divergence
from spo_kernels.engine.inputs import Execution, ModelInputs
from spo_kernels.engine.label_layout import LabelLayout
from spo_kernels.engine.renamed import refuses_old_names
from spo_kernels.engine.tokens import Tokens
from spo_kernels.head import LMHead


@refuses_old_names
def linear_kl(
    hidden: Tensor,
    head: Tensor | LMHead,
    ref_hidden: Tensor,
    ref_head: Tensor | LMHead,
    labels: Tensor,
    *,
    ignore_index: int | None = -100,
    shift: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`KL(π_ref ‖ π_θ)` of each token's distribution, exact, over the whole vocabulary.

    Equivalent PyTorch, with f the softcap of a scaled product as in `LMHead`, each head's own::

        log_p = f(ref_hidden @ ref_head.weight.T + ref_head.bias).log_softmax(-1)
        log_q = f(hidden @ head.weight.T + head.bias).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).masked_fill(labels == ignore_index, 0.0)

    Differentiable in the policy's hidden, weight and bias; the reference is constant. Cost in products of
    `[N, H] x [H, V]`: 2 forward, and backward 2 and one for each of hidden and weight that needs a gradient. What
    happens between products is done by torch operations on every backend.

    Args:
        hidden, head: The policy's, as in `linear_logprob`.
        ref_hidden, ref_head: The reference's: `[..., H_ref]`, and a head over the same vocabulary.
        labels: `[...]` int64: which positions count. Their classes are not looked at beyond that.
        ignore_index, shift, workspace_bytes, backend: As in `linear_logprob`.

    Returns:
        KL divergences in nats, float32 (float64 for float64 inputs), labels' shape, 0 where ignored.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: As in `linear_logprob`; or the two vocabularies differ.
    """
    layout = LabelLayout(labels, ignore_index, shift)
    check_alike("linear_kl", labels, head, hidden=hidden, ref_hidden=ref_hidden, ref_head=ref_head)
    policy = ModelInputs.resolve(hidden, head, labels)
    reference = ModelInputs.resolve_reference(ref_hidden, ref_head, labels, head)
    policy.check_same_vocabulary(reference)
    execution = Execution.resolve(workspace_bytes, backend, policy)
    tokens = Tokens.all_of(layout, policy.vocab)
    return kl_divergence(policy, reference, tokens, shift, execution)
