"""One batch of pairs, padded or laid in a row: what models compute of it, and what the fused loss takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from spo_kernels.arguments import check_choice
from spo_kernels.head import LMHead, inner_model
from spo_kernels.integrations.hidden import Result, Run, forward_to_head
from spo_kernels.integrations.layout.rows import PairRow, lay_row
from spo_kernels.integrations.layout.ways import NotExact, inputs_of, way_of
from spo_kernels.loss import fused_spo_loss

LAYOUTS = ("auto", "padded", "packed", "shared")
_MODEL_INPUTS = {"input_ids", "attention_mask"}
# of each model, the reasons that were given for its plain layout
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class LaidPairs:
    """A batch of B pairs, chosen first, as it was given or laid in a row without padding.

    Attributes:
        inputs: Of the model's forward, as given: input_ids and attention_mask `[2B, T]`.
        labels: As `fused_spo_loss` takes them: `[2B, T]`, to be shifted, or `[n]` with `cu_seqlens`.
        row: The row, or None for the padded batch.
    """

    inputs: Mapping[str, Any]
    labels: Tensor
    row: PairRow | None = None

    @property
    def cu_seqlens(self) -> Tensor | None:
        """`[2B + 1]` bounds of the sequences' labels; None where they are padded."""
        return None if self.row is None else self.row.cu_seqlens

    @property
    def shift(self) -> bool:
        """Whether hidden states predict the label after their own."""
        return self.row is None

    @overload
    def of_tokens(self, values: Tensor) -> Tensor: ...
    @overload
    def of_tokens(self, values: None) -> None: ...
    def of_tokens(self, values: Tensor | None) -> Tensor | None:
        """Values in the padded labels' shape (token weights, log-probabilities), as `labels` lie; others untouched."""
        if values is None or self.row is None or values.shape != self.inputs["input_ids"].shape:
            return values
        return self.row.of_tokens(values)

    def padded(self, values: Tensor) -> Tensor:
        """Values of `labels` in the padded labels' shape, 0 elsewhere."""
        return values if self.row is None else self.row.padded(values, self.inputs["input_ids"])

    def loss(
        self,
        hidden: Tensor,
        head: LMHead,
        *,
        ref_logps: Tensor | None,
        token_weights: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`fused_spo_loss` of the hidden states of `labels`; what there is of every token is in the padded shape."""
        return fused_spo_loss(
            hidden,
            head,
            self.labels,
            ref_logps=self.of_tokens(ref_logps),
            token_weights=self.of_tokens(token_weights),
            cu_seqlens=self.cu_seqlens,
            shift=self.shift,
            **options,
        )

    def for_model(
        self, model: nn.Module, run: Run | None = None
    ) -> tuple[Mapping[str, Any], Callable[[Tensor], Tensor]]:
        """Inputs of the model's forward, and a function from its last hidden states to those of `labels`.

        A model that cannot take the row (a reference of another family) computes the padded batch.
        """
        row = self.row
        if row is None:
            return self.inputs, lambda hidden: hidden
        try:
            # not hidden[0, row.index]: on a CPU, threads add the gradients of a shared token in any order
            return inputs_of(model, row, way_of(model, run)), lambda hidden: embedding(row.index, hidden[0])
        except NotExact as error:
            _say(model, str(error))
            return self.inputs, lambda hidden: hidden.flatten(0, 1)[row.places - 1]

    def hidden(self, model: nn.Module) -> tuple[Tensor, Any]:
        """The model's hidden states, `labels.shape + [H]`, and its output."""
        return self.to_head(model, lambda hidden: hidden)

    def to_head(
        self, model: nn.Module, at_head: Callable[[Tensor], Result], run: Run | None = None
    ) -> tuple[Result, Any]:
        """What `at_head` makes of these hidden states where the head runs, see `forward_to_head`."""
        inputs, of_labels = self.for_model(model, run)
        return forward_to_head(model, lambda hidden: at_head(of_labels(hidden)), run, **inputs)


def lay_pairs(
    model: nn.Module,
    labels: Tensor,
    layout: str = "auto",
    *,
    ignore_index: int = -100,
    run: Run | None = None,
    **inputs: Any,
) -> LaidPairs:
    """Lay a padded batch as the layout says, where the model takes it.

    Args:
        model: The policy, a transformers causal language model, maybe inside PEFT.
        labels: `[2B, T]`, not shifted, chosen rows first.
        layout: "padded": as given. "packed": sequences end to end, no padding. "shared": also each prompt once for all
            responses to it. "auto": shared where the model's hidden states are the padded ones, else padded, with one
            warning that says why.
        ignore_index: The label that is not scored.
        run: Called in the model's place, for who replaced the model's own forward.
        inputs: Of the model's forward: input_ids and attention_mask `[2B, T]`. With others the batch stays padded.

    Raises:
        ValueError: layout is unknown, or "packed" or "shared" where the model cannot take that, and why; or
            attention_mask has another shape.
    """
    check_layout(layout)
    plain = LaidPairs(inputs, labels)
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have input_ids' shape {list(ids.shape)}, got {list(mask.shape)}")
    if ids is None or layout == "padded" or torch.compiler.is_compiling() or not _are_pairs(labels, ids, mask):
        return plain
    further = sorted(key for key, value in inputs.items() if key not in _MODEL_INPUTS and value is not None)
    taken = layout_of(model, layout, further=further, run=run)
    if taken == "padded":
        return plain
    row = lay_row(ids, mask, labels, shared=taken == "shared", ignore_index=ignore_index)
    return plain if row is None else LaidPairs(inputs, row.labels, row)


def layout_of(model: nn.Module, layout: str = "auto", *, further: Sequence[str] = (), run: Run | None = None) -> str:
    """The layout in which a model computes pairs: "padded", "packed" or "shared".

    Args:
        model, layout, run: As in `lay_pairs`.
        further: Names of inputs of the model's forward beside input_ids and attention_mask.

    Raises:
        ValueError: As in `lay_pairs`.
    """
    check_layout(layout)
    if layout == "padded":
        return layout
    try:
        if further:
            raise NotExact(f"its forward is given {', '.join(further)}")
        way_of(model, run)
    except NotExact as error:
        if layout != "auto":
            raise ValueError(f"layout = {layout!r}: {_sentence(model, str(error))}") from None
        _say(model, str(error))
        return "padded"
    return "packed" if layout == "packed" else "shared"


def hidden_of_pairs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    layout: str = "auto",
    *,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """Hidden states, labels and cu_seqlens for `fused_spo_loss`, and the model's output.

    `fused_spo_loss(hidden, LMHead.of(model), labels, cu_seqlens=cu_seqlens, shift=cu_seqlens is None, ...)` is the loss
    of the padded batch. With several models or values of tokens, use `lay_pairs`. Arguments and errors are its.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    laid = lay_pairs(model, labels, layout, ignore_index=ignore_index, **inputs)
    hidden, output = laid.hidden(model)
    return hidden, laid.labels, laid.cu_seqlens, output


def check_layout(layout: str) -> None:
    """Raise ValueError unless it is one of LAYOUTS."""
    check_choice("layout", layout, LAYOUTS)


def _are_pairs(labels: Tensor, input_ids: Any, mask: Any) -> bool:
    """Whether it is a batch that can be laid; what is wrong with another one, model and loss say."""
    tensors = [labels, input_ids, *([] if mask is None else [mask])]
    if not all(isinstance(each, Tensor) and each.shape == labels.shape for each in tensors):
        return False
    return labels.ndim == 2 and len(labels) % 2 == 0 and labels.dtype == input_ids.dtype == torch.int64


def _sentence(model: nn.Module, reason: str) -> str:
    return f"{type(inner_model(model)).__name__} runs padded batches only: {reason}"


def _say(model: nn.Module, reason: str) -> None:
    said = _said.setdefault(inner_model(model), set())
    if reason not in said:
        said.add(reason)
        warnings.warn(_sentence(model, reason), stacklevel=3)
