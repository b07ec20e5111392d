"""A head that is also the model's embedding: both add to one gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spo_kernels.head import inner_model


@contextmanager
def one_gradient(model: nn.Module) -> Iterator[None]:
    """In a forward, let the embedding's rows be added to the tied weight's `.grad` where they belong.

    Autograd would make a second `[V, H]` of them, and a third for the sum. For one process and backward() alone, as
    `LMHead(accumulate=True)`; without effect on a model whose embedding is not tied or not trained.
    """
    embedding = _tied(inner_model(model))
    if embedding is None or not torch.is_grad_enabled():
        yield
        return
    # written past the module's own setting, which takes parameters only; the gradient then comes as rows
    parameters: dict[str, Any] = embedding._parameters
    weight, sparse = parameters["weight"], embedding.sparse
    parameters["weight"] = _IntoGradient.apply(weight.new_zeros((), requires_grad=True), (weight,))
    embedding.sparse = True
    try:
        yield
    finally:
        parameters["weight"], embedding.sparse = weight, sparse


def _tied(model: Any) -> nn.Embedding | None:
    """The model's embedding, where its weight is the head's and trained."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.scale_grad_by_freq:
        return None
    return embedding if embedding.weight is getattr(head, "weight", None) and embedding.weight.requires_grad else None


class _IntoGradient(torch.autograd.Function):
    """The weight, whose gradient is added to its `.grad` and goes no further.

    The weight comes in a tuple, and a leaf in its place, so that autograd does not wait for it with the head's.
    """

    @staticmethod
    def forward(ctx: Any, _: Tensor, weights: tuple[Tensor]) -> Tensor:
        ctx.weights = weights
        return weights[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        (weight,) = ctx.weights
        if weight.grad is None:
            weight.grad = grad.to_dense()
        else:
            weight.grad.add_(grad)
        return None, None
