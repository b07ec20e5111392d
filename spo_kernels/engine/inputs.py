"""What a public call was given, checked and cast, each argument once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_kernels.backends.contract import LogitTransform
from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.backends.registry import choose_backend
from spo_kernels.engine.checks import FLOAT_DTYPES, capturing, check_tensor, check_workspace_bytes, is_traced
from spo_kernels.engine.collectives import check_same
from spo_kernels.engine.head_slices import HeadSlices, Shard
from spo_kernels.engine.op_arguments import ModelTensors
from spo_kernels.engine.row_stream import RowStream
from spo_kernels.engine.vocab_shard import VocabShard
from spo_kernels.head import LMHead, as_head
from spo_kernels.sparsity import Sparsity, as_sparsity

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ModelInputs:
    """A model's last hidden states and head, in the dtype that they are computed in.

    With adapters, `hidden` has what they make of it behind it and `weight` is their last step, beside a base.
    """

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H], or [V, r] beside a base
    bias: Tensor | None  # [V]
    logit_scale: float
    logit_softcap: float | None
    base: Tensor | None = None  # [V, H - r]
    accumulate: bool = False  # into the weight's .grad, where it exists
    shard: Shard | None = None  # weight, bias and base are a part of the head's rows

    @classmethod
    def resolve(cls, hidden: Tensor, head: Tensor | LMHead, labels: Tensor, prefix: str = "") -> ModelInputs:
        """Check and cast; `prefix` begins the names of a reference's arguments.

        Raises:
            TypeError, ValueError: The message names the argument.
        """
        name = f"{prefix}hidden"
        check_tensor(name, hidden, labels)
        head, weight_name = as_head(f"{prefix}head", head)
        named = {name: hidden, weight_name: head.weight}
        check_tensor(weight_name, head.weight, labels)
        if head.bias is not None:
            named[f"{prefix}head.bias"] = head.bias
            check_tensor(f"{prefix}head.bias", head.bias, labels)
        _check_shapes(name, hidden, weight_name, head, f"{prefix}head.bias", labels)
        for key, value in named.items():
            if value.device != labels.device:
                raise ValueError(f"{key} is on {value.device}, but labels is on {labels.device}")
        _check_dtypes(named)
        weight, bias, base = head.weight, head.bias, None
        if head.lora:
            _check_adapters(f"{prefix}head.lora", head, labels)
            if torch.is_grad_enabled() and weight.requires_grad:
                raise ValueError(
                    f"{weight_name} is trained and carries adapters, beside which it gets no gradient: freeze it, or "
                    "merge them"
                )
            hidden, weight, base = *head.with_adapters(hidden), weight
        device = hidden.device.type
        if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias, base = (None if value is None else value.to(dtype) for value in (bias, base))
        accumulate = head.accumulate and head.weight.requires_grad and not head.lora
        reason = why_not_accumulate(head.weight) if accumulate else None
        if reason is not None:
            raise ValueError(f"{weight_name}: accumulate=True cannot be used: {reason}")
        _check_sharded(f"{prefix}head", head, labels)
        shard: Shard | None = None
        if head.vocab_group is not None:
            shard = VocabShard.agree(weight_name, head.vocab_group, head.weight, labels)
        elif head.shard_group is not None:
            shard = RowStream.agree(weight_name, head.shard_group, head.weight, head.bias)
        found = cls(hidden, weight, bias, head.logit_scale, head.logit_softcap, base, accumulate, shard)
        # a Function sees requires_grad, not the mode: under no_grad it would make gradients that nobody can ask for
        return found if torch.is_grad_enabled() else found.detach()

    @classmethod
    def resolve_reference(
        cls, hidden: Tensor, head: Tensor | LMHead, labels: Tensor, policy_head: Tensor | LMHead
    ) -> ModelInputs:
        """The same for a reference, as constants.

        Raises:
            ValueError: Its head is a weight, where the policy's has a scale, a softcap or a part of the rows: one of
                them would be wrong.
        """
        if isinstance(policy_head, LMHead) and isinstance(head, Tensor):
            has = None
            if policy_head.transforms:
                has = f"logit_scale = {policy_head.logit_scale} and logit_softcap = {policy_head.logit_softcap}"
            elif policy_head.split_by is not None:
                has = f"a {policy_head.split_by}"
            if has is not None:
                raise ValueError(
                    f"ref_head is a plain weight, but head has {has}: say what the reference has, with "
                    "ref_head=LMHead(ref_weight, ...)"
                )
        return cls.resolve(hidden, head, labels, "ref_").detach()

    def check_same_vocabulary(self, reference: ModelInputs) -> None:
        """Raise ValueError or TypeError unless distributions of both can be compared."""
        vocab, ref_vocab = self.vocab, reference.vocab
        if ref_vocab != vocab:
            raise ValueError(f"ref_head must have head's vocabulary, V = {vocab} rows, got {ref_vocab}")
        if self.streams or reference.streams:
            raise ValueError(
                "a KL divergence looks at the same rows of two heads at a time, and those of a head with a shard_group "
                "pass by in slices: gather it"
            )
        ours, theirs = self.shard, reference.shard
        if (ours or theirs) and not (isinstance(ours, VocabShard) and ours.same_as(theirs)):
            raise ValueError("ref_head must be split like head: the same rows on the same processes (vocab_group)")
        if self.wide != reference.wide:
            raise TypeError(
                f"ref_hidden is {reference.hidden.dtype}, but hidden is {self.hidden.dtype}: float64 needs both"
            )

    def detach(self) -> ModelInputs:
        """The same as constants."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def tensors(self) -> ModelTensors:
        """As ops take them; a softcap of 0 for none.

        Scale and softcap are in a tensor: a graph is compiled anew for every value of a float that crosses into an op.
        """
        numbers = (self.logit_scale, 0.0 if self.logit_softcap is None else self.logit_softcap)
        if torch.compiler.is_compiling():
            # torch.tensor and torch.full would take a symbolic number for the one that it has while it is traced
            transform = torch.stack([torch.ones((), dtype=torch.float64) * number for number in numbers])
        else:
            transform = torch.tensor(numbers, dtype=torch.float64)
        return ModelTensors(self.hidden, self.weight, self.bias, transform, self.base)

    def slices(self) -> HeadSlices:
        """The head as the engine sees it."""
        transform = LogitTransform(float(self.logit_scale), self.logit_softcap)
        return HeadSlices(self.weight, self.bias, transform, self.base, self.shard)

    @property
    def vocab(self) -> int:
        """V, of all processes that have rows."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab

    @property
    def streams(self) -> bool:
        """Whether rows of the head come from other processes, slice by slice."""
        return isinstance(self.shard, RowStream)

    @property
    def trains_head(self) -> bool:
        """Whether a gradient of the weight or the bias is wanted."""
        bias = self.bias is not None and self.bias.requires_grad
        return torch.is_grad_enabled() and (self.weight.requires_grad or bias)

    @property
    def adds_to_grad(self) -> bool:
        """Whether the backward finds a gradient of the weight to add to."""
        return self.accumulate and self.weight.grad is not None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits, statistics and sums."""
        return accumulator_dtype(self.hidden.dtype)


def _check_shapes(name: str, hidden: Tensor, weight_name: str, head: LMHead, bias_name: str, labels: Tensor) -> None:
    weight, bias = head.weight, head.bias
    if hidden.ndim < 1:
        raise ValueError(f"{name} must have shape [..., H], got a 0-d tensor")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} must have shape [V, H] with H = {hidden.shape[-1]} ({name}'s last dimension), "
            f"got {list(weight.shape)}"
        )
    # of several processes, all are to say that one has no rows
    if weight.shape[1] == 0 or (weight.shape[0] == 0 and head.split_by is None):
        raise ValueError(f"{weight_name} must not be empty, got shape {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{bias_name} must have shape [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    if labels.shape != hidden.shape[:-1]:
        leading, of_labels = list(hidden.shape[:-1]), list(labels.shape)
        if name == "hidden":
            raise ValueError(f"labels must have hidden's leading shape {leading}, got {of_labels}")
        raise ValueError(f"{name} must have the labels' leading shape {of_labels}, got {leading}")


def _check_adapters(name: str, head: LMHead, labels: Tensor) -> None:
    vocab, width = head.weight.shape
    for i, lora in enumerate(head.lora):
        check_tensor(f"{name}[{i}].a", lora.a, labels)
        check_tensor(f"{name}[{i}].b", lora.b, labels)
        for part, value in (("a", lora.a), ("b", lora.b)):
            if value.dtype not in FLOAT_DTYPES:
                raise TypeError(f"{name}[{i}].{part} must be one of {_float_names()}, got {value.dtype}")
        shapes = list(lora.a.shape), list(lora.b.shape)
        if shapes != ([len(lora.a), width], [vocab, len(lora.a)]):
            raise ValueError(
                f"{name}[{i}] must have a [r, H] and b [V, r] with H = {width} and V = {vocab}, got {shapes[0]} and "
                f"{shapes[1]}"
            )


def _check_sharded(name: str, head: LMHead, labels: Tensor) -> None:
    """Raise where a head's rows cannot be shared by the group that it has for them."""
    group = head.split_by
    if group is None:
        return
    if is_traced(labels) or capturing(labels):
        raise RuntimeError(
            f"{name} has a {group}, whose processes talk to each other: that is not traced or recorded in a CUDA "
            "graph; call this outside, under torch.compiler.disable"
        )
    if head.shard_group is not None and (head.lora or head.accumulate):
        what = "adapters" if head.lora else "accumulate=True"
        raise ValueError(f"{name} has a shard_group, whose rows pass by in slices, and {what}: leave one of them")
    for i, lora in enumerate(head.lora):
        if lora.drops:
            raise ValueError(
                f"{name}.lora[{i}] has dropout, which would differ between the processes of vocab_group: set it to 0"
            )


def why_not_accumulate(weight: Tensor) -> str | None:
    """What between a backward and the weight's .grad would be passed by; None where nothing is."""
    device = weight.device.type
    if not weight.is_leaf:
        return "it is no leaf: its gradient goes on to what it was made of"
    if type(weight) not in (Tensor, torch.nn.Parameter):
        return f"it is a {type(weight).__name__}, whose gradient is not a plain tensor"
    if torch.is_autocast_enabled(device) and weight.dtype not in (torch.float64, torch.get_autocast_dtype(device)):
        return "autocast casts it"
    if weight.grad is not None and (weight.grad.layout != torch.strided or weight.grad.is_inference()):
        return "its .grad is sparse, or was made under inference_mode"
    if weight.grad is not None and weight.grad.stride(1) != 1:
        return f"its .grad is not laid out row by row (strides {list(weight.grad.stride())})"
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        return "there are several processes, whose sum of gradients would miss it"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "a hook on it waits for its gradient"
    return None


def _check_dtypes(named: dict[str, Tensor]) -> None:
    """One floating dtype for hidden, weight and bias; under autocast, which casts them, any."""
    (first, hidden), *_ = named.items()
    for name, value in named.items():
        if value.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be one of {_float_names()}, got {value.dtype}")
        if value.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(f"{name} is {value.dtype}, but {first} is {hidden.dtype}; cast one of them")


def _float_names() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)


@dataclass(frozen=True)
class Execution:
    """How a call is to be computed, beside what."""

    workspace_bytes: int | None
    backend: str
    sparsity: Sparsity

    @classmethod
    def resolve(
        cls, workspace_bytes: int | None, backend: str | None, model: ModelInputs, sparsity: str | Sparsity = "exact"
    ) -> Execution:
        """Check the options, and choose the backend for the model's tensors."""
        check_workspace_bytes(workspace_bytes)
        name = choose_backend(backend, model.hidden.device, model.hidden.dtype)
        found = cls(workspace_bytes, name, as_sparsity(sparsity))
        if model.streams and found.sparsity.mode != "exact":
            raise ValueError(f"sparsity must be 'exact' where head has a shard_group, got {found.sparsity.mode!r}")
        if isinstance(model.shard, VocabShard):
            found.check_same("head's vocab_group", model.shard.group, model.hidden.device)
        return found

    def check_same(self, name: str, group: ProcessGroup, device: torch.device) -> None:
        """Tiles of other sizes would be exchanged with other processes' at another moment, or never."""
        check_same(group, name, {"workspace_bytes, backend and sparsity": self}, device)
