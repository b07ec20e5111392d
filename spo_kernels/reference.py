"""The specification of the primitive in plain torch, full logits included: what every path is tested against."""

import torch
from torch import Tensor


def logits_ref(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """`softcap(logit_scale * (hidden @ weight.T + bias))`, `[..., V]`, in the inputs' dtype."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return logits


def linear_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`linear_logprob` with every optional output, by materialising the logits; autograd gives its gradients."""
    counts = labels != ignore_index
    if shift:
        hidden = torch.cat([torch.zeros_like(hidden[..., :1, :]), hidden[..., :-1, :]], dim=-2)
        counts = counts & (torch.arange(labels.shape[-1], device=labels.device) > 0)
    logits = logits_ref(hidden, weight, bias, logit_scale, logit_softcap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    index = labels.clamp(0, weight.shape[0] - 1)[..., None]
    label_logit = logits.gather(-1, index)[..., 0]
    extras = {
        "lse": logits.logsumexp(-1),
        "correct": label_logit == logits.amax(-1),
        "entropy": -torch.where(p == 0, 0.0, p * log_p).sum(-1),
        "log_sum_p2": (2.0 * log_p).logsumexp(-1),
    }
    # masking by where, not by multiplication, keeps nan and inf of ignored positions out
    zero = logits.new_zeros(())
    logp = torch.where(counts, log_p.gather(-1, index)[..., 0], zero)
    return logp, {name: torch.where(counts, v, zero.to(v.dtype)) for name, v in extras.items()}
