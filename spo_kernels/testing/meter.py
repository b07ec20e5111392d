"""Bytes and matrix products, counted."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Products a metered operator can make; the value is the position of its left operand.
_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "matmul": 0, "linear": 0, "dot": 0, "vdot": 0}
_PRODUCTS |= {"addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1, "addmv": 1, "addmv_": 1}


class TensorMeter(TorchDispatchMode):
    """Counts what the code under it creates and multiplies, also inside this package's own operators.

    Attributes: `largest` (bytes of the largest tensor created), `live` and `peak` (bytes of the storages created
    and still alive, now and at most), `flops` (of matrix products: 2 per multiply-add).
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._watch(tensor, new=False)
        if func.namespace == "spo_kernels":
            key = getattr(torch._C.DispatchKey, inputs[0].device.type.upper())
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf, new=True)
        position = _PRODUCTS.get(func.overloadpacket.__name__)
        if position is not None:
            self.flops += 2 * result.numel() * args[position].shape[-1]
        return result

    def _watch(self, tensor: Tensor, *, new: bool) -> None:
        if tensor.layout == torch.sparse_coo:
            tensor = tensor._values()
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes() if new else 0
        self._sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
