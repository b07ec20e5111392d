"""Tensors that no kernel can read, each made from a plain one, and what a refusal must advise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

Function = Callable[[Tensor], Any]


class Unfit(Exception):
    """There is no such tensor of this shape or dtype."""


@dataclass(frozen=True)
class Kind:
    """`apply` calls a function with such a tensor; `remedy` is a pattern that a refusal must contain."""

    name: str
    apply: Callable[[Function, Tensor], Any]
    remedy: str


class Wrapped(Tensor):
    """A subclass without storage of its own, as users and quantisation libraries write them."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(Tensor, Wrapped, func(*args, **kwargs))


class Named(Tensor):
    """A subclass with storage, such as transformers' and fastai's: nothing is wrong with it."""


def made_by(make: Callable[[Tensor], Tensor]) -> Callable[[Function, Tensor], Any]:
    """The made tensor requires a gradient where the plain one does and its dtype can."""

    def apply(function: Function, tensor: Tensor) -> Any:
        try:
            made = make(tensor.detach())
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise Unfit(str(error)) from error
        return function(made.requires_grad_() if tensor.requires_grad and made.is_floating_point() else made)

    return apply


def differentiated(function: Function, tensor: Tensor) -> Any:
    """Inside torch.func.grad."""
    if not tensor.is_floating_point():
        raise Unfit("an integer has no gradient")
    results = []

    def inner(t: Tensor) -> Tensor:
        results.append(function(t))
        return results[-1].sum()

    torch.func.grad(inner)(tensor.detach())
    return results[-1]


def mapped(function: Function, tensor: Tensor) -> Any:
    """Inside torch.func.vmap, over two copies."""
    return torch.func.vmap(function)(torch.stack([tensor.detach()] * 2))[0]


def quantised(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        raise Unfit("only float32 is quantised")
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def sparse_rows(tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:
        raise Unfit("rows need two dimensions")
    # batches need equally many values each, so no zeros
    return torch.where(tensor == 0, tensor + 1, tensor).to_sparse_csr()


def kinds() -> list[Kind]:
    """All of them; starts a process group of one for DTensor."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    plain = r"plain tensor|dense"
    return [
        Kind("DTensor sharded", made_by(lambda t: distribute_tensor(t, mesh, [Shard(0)])), r"full_tensor\(\)"),
        Kind("DTensor replicated", made_by(lambda t: distribute_tensor(t, mesh, [Replicate()])), r"full_tensor\(\)"),
        Kind("TwoTensor", made_by(lambda t: TwoTensor(t, t.clone())), plain),
        Kind("wrapper subclass", made_by(Wrapped), plain),
        Kind("subclass with storage", made_by(lambda t: t.clone().as_subclass(Named)), plain),
        Kind("meta", made_by(lambda t: t.to("meta")), r"meta.*(FakeTensor|to_empty|load)"),
        Kind("FakeTensor among plain ones", made_by(lambda t: FakeTensorMode().from_tensor(t)), r"FakeTensor"),
        Kind("sparse COO", made_by(lambda t: t.to_sparse()), r"to_dense\(\)"),
        Kind("sparse CSR", made_by(sparse_rows), r"to_dense\(\)"),
        Kind("nested", made_by(lambda t: torch.nested.nested_tensor(list(t))), r"cu_seqlens|to_padded_tensor"),
        Kind(
            "nested, jagged",
            made_by(lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged)),
            r"cu_seqlens|to_padded_tensor",
        ),
        Kind("quantised", made_by(quantised), r"dequantize\(\)"),
        Kind("torch.func.grad", differentiated, r"torch\.func|functorch"),
        Kind("torch.func.vmap", mapped, r"torch\.func|functorch"),
    ]
