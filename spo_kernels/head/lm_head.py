"""`LMHead`: everything about a language model's head in one value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spo_kernels.arguments import check_flag, is_number
from spo_kernels.head.gathered import ShardedHead, gathered, kept_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Names in configurations; logits are multiplied by each factor
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Model types whose configuration multiplies by `logits_scaling`; the others (Granite) divide.
_MULTIPLIES_LOGITS_SCALING = frozenset({"hyperclovax"})
# What a model type's configuration names and its logits do not have: MiniCPM3 divides hidden states by it, before the
# head, and transformers' MPT does not read it.
_NOT_OF_LOGITS = {"minicpm3": "logits_scaling", "mpt": "logit_scale"}
# what wrappers call the module inside: DDP and DeepSpeed, torch.compile
_WRAPPED = ("module", "_orig_mod")
# logits are multiplied by the scale and divided by the cap in float32
_LARGEST, _LEAST_SOFTCAP = 3e38, 1e-30


@dataclass(frozen=True, eq=False)
class LMHead:
    """A head `logits = softcap(logit_scale * (hidden @ weight.T + bias))`, `softcap(x) = c * tanh(x / c)`.

    Every function of this library that takes a head takes one of these or, where there is nothing but a weight, the
    weight `[V, H]` itself.

    Attributes:
        weight: `[V, H]`; float32, bfloat16, float16 or float64.
        bias: `[V]`, same dtype, or None.
        logit_scale: Multiplies the products (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`, the
            inverse of a sampling temperature).
        logit_softcap: c, Gemma's `final_logit_softcapping`; None for none.
        lora: Adapters, whose products are added to those of the weight. It is then a constant; no `[V, H]` gradient and
            no copy of it are made.
        accumulate: Where `weight.grad` exists already, the backward adds the weight's gradient to it slice by slice and
            gives autograd none, so that no second `[V, H]` exists. A loss then takes three products where the workspace
            holds the tile of all its tokens, which is kept for the backward, else four. For one process, one thread and
            backward() without `inputs` alone: what reads the gradient on its way (DDP, a hook, torch.autograd.grad)
            would not see it. Without effect under torch.compile.
        vocab_group: A process group that shares the rows: its process of rank r has the r-th part of them in `weight`,
            `bias` and the adapters' b, of any sizes, and all have the same hidden states, labels and options. They get
            the same results and the whole gradient of hidden; gradients of weight and bias are of their own rows. See
            docs/sharded-heads.md.
        shard_group: A process group that shares the rows in the same way, but whose processes have tokens of their own,
            any number of them or none, as under FSDP. Rows of the others come in slices, one after the other, and no
            process ever holds all of them. Gradients of weight and bias are the mean over processes, of the process's
            own rows. See `shard_head`.
        sequence_group: A process group that shares the tokens of each sequence (context parallelism): each process has
            some of them, in any order, with labels that were shifted before, and as many sequences as the others.
            Sums over a sequence, lengths and metrics are those of all; gradients are of the process's own tokens.

    Raises:
        TypeError, ValueError: A number is none, or not finite; a group is none, or there are two for the rows. Tensors,
            and whether they can accumulate, are checked where the head is used.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = field(default=1.0, kw_only=True)
    logit_softcap: float | None = field(default=None, kw_only=True)
    lora: tuple[LoRA, ...] = field(default=(), kw_only=True)
    accumulate: bool = field(default=False, kw_only=True)
    vocab_group: ProcessGroup | None = field(default=None, kw_only=True)
    shard_group: ProcessGroup | None = field(default=None, kw_only=True)
    sequence_group: ProcessGroup | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # the numbers may be symbolic there
            return
        if not _is_finite(self.logit_scale):
            raise ValueError(f"logit_scale must be a finite number, got {self.logit_scale!r}")
        if not isinstance(self.lora, (tuple, list)) or not all(isinstance(each, LoRA) for each in self.lora):
            raise TypeError(f"lora must be a tuple of LoRA, got {type(self.lora).__name__}")
        cap = self.logit_softcap
        if cap is not None and not (_is_finite(cap) and cap >= _LEAST_SOFTCAP):
            raise ValueError(f"logit_softcap must be a number of at least {_LEAST_SOFTCAP:g} or None, got {cap!r}")
        check_flag("accumulate", self.accumulate)
        if self.vocab_group is not None and self.shard_group is not None:
            raise ValueError("vocab_group and shard_group both say who has the rows: give one of them")
        for name in ("vocab_group", "shard_group", "sequence_group"):
            group = getattr(self, name)
            if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
                raise TypeError(f"{name} must be a process group that this process is in, got {type(group).__name__}")

    @property
    def split_by(self) -> str | None:
        """The name of the group that has the other rows, where there is one."""
        return next((name for name in ("vocab_group", "shard_group") if getattr(self, name) is not None), None)

    @property
    def transforms(self) -> bool:
        """Whether logits are more than products and bias."""
        return self.logit_scale != 1.0 or self.logit_softcap is not None

    def with_adapters(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`[hidden, what the adapters make of it]` `[..., H + r]` and their last steps `[V, r]`, in hidden's dtype.

        `[h, s h Aᵀ] · [W, B]ᵀ` is the product of the adapted head.
        """
        reduced = [lora.reduced(hidden).to(hidden.dtype) for lora in self.lora]
        steps = [lora.b.to(hidden.dtype) for lora in self.lora]
        # autocast of the other half precision cannot join tensors of this one
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.cat([hidden, *reduced], -1), steps[0] if len(steps) == 1 else torch.cat(steps, 1)

    @classmethod
    def of(cls, model: nn.Module, *, tensor_parallel: str = "tp") -> LMHead:
        """The head of a transformers causal language model, also inside PEFT, DDP, FSDP2, DeepSpeed or torch.compile.

        Scale and softcap are read from the configuration. Equivalent, for a plain Llama: `LMHead(lm_head.weight)`.
        What PEFT has put there is taken as it is at the moment: LoRA's active adapters, with dropout while they train;
        a trained copy (`modules_to_save`); neither where adapters are switched off.
        A weight of which this process holds a part (a DTensor) is gathered: all processes must call this together. Its
        gradient is the mean over them.
        But a split of its rows over a dimension of the mesh that is named `tensor_parallel`, as transformers' tp_plan
        and accelerate name it, stays: its processes are the head's `vocab_group`. Over a mesh without names it is
        gathered, which is right too and takes the memory of the whole; init_device_mesh takes mesh_dim_names.
        What `shard_head` has put there stays split too: its mesh's processes are the head's `shard_group`.

        Args:
            model: The model, or what PEFT, DDP, FSDP2, DeepSpeed or torch.compile made of it.
            tensor_parallel: The name of the mesh's dimension over which a split of the rows stays.

        Returns:
            The head, whose weight `[V, H]` is the model's own tensor.

        Raises:
            TypeError: The model has no configuration, or no linear head.
            ValueError: The head carries an adapter that is no plain LoRA, or is quantised.
        """
        inner = inner_model(model)
        kind = type(inner).__name__
        if not hasattr(inner, "config") or not hasattr(inner, "get_output_embeddings"):
            raise TypeError(f"model must be a transformers causal language model, got {kind}")
        head = inner.get_output_embeddings()
        if head is None:
            raise TypeError(f"{kind} has no output embeddings, so there is no head to fuse with a loss")
        head = _active_copy(head)
        plain = head.base_layer if hasattr(head, "base_layer") else head
        check_linear(kind, plain)
        scale, softcap = logit_transform(inner.config)
        if isinstance(plain, ShardedHead):
            if plain is not head:
                raise ValueError(f"{kind}: the head carries an adapter, and shard_head has split it: leave one of them")
            rows, bias, group = plain.rows()
            return cls(rows, bias, logit_scale=scale, logit_softcap=softcap, shard_group=group)
        weight, group = kept_rows(plain.weight, tensor_parallel)
        bias, _ = kept_rows(plain.bias, tensor_parallel)
        lora: tuple[LoRA, ...] = ()
        if plain is not head:
            lora, bias = _active_lora(kind, head, bias, tensor_parallel)
        return cls(weight, bias, logit_scale=scale, logit_softcap=softcap, lora=lora, vocab_group=group)


@dataclass(frozen=True, eq=False)
class LoRA:
    """A low-rank adapter of a head: it adds `scale * dropout(hidden) @ a.T @ b.T` to `hidden @ weight.T`.

    Attributes:
        a: `[r, H]`, floating.
        b: `[V, r]`, floating.
        scale: α / r, or α / √r.
        dropout: What hidden states go through first; None for nothing.

    Raises:
        TypeError, ValueError: The scale is no finite number, or dropout cannot be called. Tensors are checked where
            the head is used.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    dropout: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # the scale may be symbolic there
            return
        if not _is_finite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale!r}")
        if self.dropout is not None and not callable(self.dropout):
            raise TypeError(f"dropout must be a function or module of hidden states, or None, got {self.dropout!r}")

    @property
    def drops(self) -> bool:
        """Whether it draws random numbers."""
        dropout = self.dropout
        if isinstance(dropout, nn.Module):
            return dropout.training and getattr(dropout, "p", 0.0) > 0
        return dropout is not None

    def reduced(self, hidden: Tensor) -> Tensor:
        """`scale * dropout(hidden) @ a.T`, `[..., r]`."""
        hidden = hidden.to(self.a.dtype)
        return self.scale * nn.functional.linear(hidden if self.dropout is None else self.dropout(hidden), self.a)


def _active_copy(head: Any) -> Any:
    """The head, or what PEFT's `modules_to_save` has in its place."""
    if not hasattr(head, "modules_to_save"):
        return head
    names = [] if head.disable_adapters else [name for name in head.active_adapters if name in head.modules_to_save]
    return head.modules_to_save[names[0]] if names else head.original_module


def _active_lora(
    kind: str, head: Any, bias: Tensor | None, tensor_parallel: str
) -> tuple[tuple[LoRA, ...], Tensor | None]:
    """The adapters that a PEFT layer adds to its base at the moment, and its bias with theirs."""
    if head.disable_adapters or head.merged:
        return (), bias
    if not hasattr(head, "lora_A"):
        raise ValueError(f"{kind}: the head carries an adapter of {type(head).__module__}; merge it (merge_and_unload)")
    found = []
    for name in (name for name in head.active_adapters if name in head.lora_A):
        variant = head.lora_variant.get(name)
        if variant is not None:
            raise ValueError(
                f"{kind}: the head's adapter {name!r} is a {type(variant).__name__}, which is more than a sum of two "
                "products; leave the head out of its targets, or merge it (merge_and_unload)"
            )
        a, b, scale = head.lora_A[name].weight, head.lora_B[name], head.scaling[name]
        rows, _ = kept_rows(b.weight, tensor_parallel)
        found.append(LoRA(gathered(a), rows, scale, head.lora_dropout[name]))
        if b.bias is not None:
            more = kept_rows(b.bias, tensor_parallel)[0] * scale
            bias = more.to(head.base_layer.weight.dtype) if bias is None else bias + more
    return tuple(found), bias


def _is_finite(value: object) -> bool:
    return is_number(value) and abs(value) <= _LARGEST


def inner_model(model: Any) -> Any:
    """The causal language model inside the wrappers that training puts around it."""
    while True:
        name = next((name for name in _WRAPPED if isinstance(getattr(model, name, None), nn.Module)), None)
        if name is not None:
            model = getattr(model, name)
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def logit_transform(config: Any) -> tuple[float, float | None]:
    """What a transformers configuration says about its logits: scale and softcap, as in `LMHead`."""
    text = config.get_text_config()
    scale = math.prod(_number(text, name, 1.0) for name in _FACTORS)
    scaling = _number(text, "logits_scaling", 1.0)
    scale = scale * scaling if text.model_type in _MULTIPLIES_LOGITS_SCALING else scale / scaling
    return scale, next(filter(None, (_number(text, name, 0.0) for name in _SOFTCAPS)), None)


def _number(config: Any, name: str, default: float) -> float:
    value = None if _NOT_OF_LOGITS.get(config.model_type) == name else getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else default


def check_linear(kind: str, head: nn.Module) -> None:
    """Raise TypeError or ValueError unless the head of such a model is a linear layer with floating weights."""
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Linear) or weight is None:
        raise TypeError(f"{kind}: the head is a {type(head).__name__}; a plain nn.Linear is needed")
    if hasattr(weight, "quant_state") or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ValueError(f"{kind}: the head's weight is quantised ({weight.dtype}); dequantise it first")


def sequence_group(head: object) -> ProcessGroup | None:
    """The group of a head that shares the tokens of its sequences."""
    return head.sequence_group if isinstance(head, LMHead) else None


def as_head(name: str, head: Tensor | LMHead) -> tuple[LMHead, str]:
    """The head, and how messages are to call its weight.

    Raises:
        TypeError: It is neither a tensor nor an `LMHead`.
    """
    if isinstance(head, LMHead):
        return head, f"{name}.weight"
    if isinstance(head, Tensor):
        return LMHead(head), name
    hint = ""
    if isinstance(head, nn.Module):
        hint = ": use LMHead(weight, bias) of it" if isinstance(head, nn.Linear) else ": use LMHead.of(model)"
    raise TypeError(f"{name} must be a weight [V, H] or an LMHead, got {type(head).__name__}{hint}")
