"""A model's own logits of one position beside what `LMHead.of` says of its head: no product is needed for it."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from spo_kernels.backends.contract import LogitTransform
from spo_kernels.backends.torch_backend import to_logits
from spo_kernels.engine.checks import capturing, is_traced
from spo_kernels.head.lm_head import logit_transform

_COMPARED: WeakSet[nn.Module] = WeakSet()


def is_new(model: nn.Module) -> bool:
    """Whether its logits were not compared yet."""
    return model not in _COMPARED


def check_own_logits(model: nn.Module, head: Any, products: Tensor, output: Any) -> None:
    """The model's logits of the last position must be what `LMHead.of` makes of `products`, the head's output there.

    Raises:
        ValueError: They are not; the model does something to them that `logit_transform` does not know.
    """
    logits = getattr(output, "logits", None)
    # parts of a head, as tensor parallelism has them, are joined somewhere between
    if type(logits) is not Tensor or type(products) is not Tensor or products.shape[-1] != len(head.weight):
        return
    alike = logits.shape[:-1] == products.shape[:-1] and products.numel() > 0
    if not alike or is_traced(products) or capturing(products):
        return
    kind = type(model).__name__
    if logits.shape[-1] != products.shape[-1]:
        raise ValueError(
            f"{kind} cuts its {products.shape[-1]} logits to {logits.shape[-1]}: the head has rows that are no "
            "classes; cut its weight to them (resize_token_embeddings)"
        )
    scale, softcap = logit_transform(model.config)
    expected = to_logits(products.float(), None, LogitTransform(scale, softcap))
    rounding = 8 * max(torch.finfo(values.dtype).eps for values in (products, logits)) * expected.abs().max()
    # a model over several devices gives its output on that of its input
    difference = (logits.detach().to(expected.device).float() - expected).abs().max()
    if difference > rounding:
        raise ValueError(
            f"{kind}: its logits are not those of its head and configuration (logit_scale {scale:g}, logit_softcap "
            f"{softcap}), they differ by {difference.item():.2g}: it changes them in a way that is not known here; "
            "pass hidden states and an LMHead of your own to fused_spo_loss"
        )
    _COMPARED.add(model)
