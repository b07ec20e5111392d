"""A batch of preference pairs: what a call was given, resolved once and shared by every way to compute it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels.engine.autograd import OUTPUTS, LogprobCall
from spo_kernels.engine.checks import capturing, check_token_weights, check_vector, is_traced
from spo_kernels.engine.divergence_ops import kl_divergence
from spo_kernels.engine.inputs import Execution, ModelInputs
from spo_kernels.engine.subsets import PairTokens
from spo_kernels.engine.tokens import LabelLayout, Tokens
from spo_kernels.engine.vocab_shard import VocabShard
from spo_kernels.head import LMHead
from spo_kernels.losses.pairs import (
    Objective,
    PairInputs,
    PairLogps,
    pair_losses,
    token_outputs_of,
    token_subsets_of,
)
from spo_kernels.losses.state import same_pairs
from spo_kernels.sparsity import Sparsity


@dataclass(frozen=True)
class Given:
    """What the caller said of one model: hidden states and head, or log-probabilities; and what its tokens weigh."""

    hidden: Tensor | None
    head: Tensor | LMHead | None
    token_weights: Tensor | None = None
    logps: Tensor | None = None  # [2B] sums, or of tokens in labels' shape


@dataclass(frozen=True)
class Pilots:
    """Random tokens of each response, and the reference's log-probabilities summed over them; see `SGDPO`."""

    subsets: Tensor  # labels' shape, 0 or 1
    reference: Tensor  # [2B]

    @classmethod
    def draw(
        cls, shares: tuple[float, float], tokens: PairTokens, layout: LabelLayout, model: ModelInputs, logp: Tensor
    ) -> Pilots:
        """These shares of the chosen and rejected tokens, of which the reference's `logp` (labels' shape) are known."""
        subsets = tokens.pilot_subsets(*shares)
        if model.shard is not None:
            subsets = model.shard.of_first(subsets)
        return cls(subsets, layout.sum(logp, subsets).to(model.wide))


@dataclass(frozen=True)
class PairBatch:
    """B pairs, ready to be computed; sequences are chosen first, `[2B]`."""

    objective: Objective
    layout: LabelLayout
    policy: ModelInputs
    tokens: Tokens  # that take part in the policy's products
    lengths: Tensor  # [2B] how many of them each sequence has here
    host_lengths: list[int] | None  # the same, where the host knows them; see `_HostCounts`
    token_weights: Tensor | None  # labels' shape
    inputs: PairInputs  # what the objective sees beside the policy's log-probabilities
    kl: Tensor | None  # labels' shape, for an objective that asks for it
    pilots: Pilots | None  # for an objective that asks for them
    execution: Execution
    token_metrics: bool
    reduced: bool  # to one loss; else they are returned one by one
    scale: float  # by which the sum of the losses is multiplied

    @property
    def pairs(self) -> int:
        """B."""
        return self.layout.sequences // 2

    @property
    def token_outputs(self) -> tuple[str, ...]:
        """Sums over tokens that the objective asks for, without those that are known already."""
        return tuple(name for name in token_outputs_of(self.objective) if name != "kl")

    @property
    def moments(self) -> bool:
        """Whether entropy or log Σ p² are wanted of any token."""
        return self.token_metrics or any(name in OUTPUTS for name in self.token_outputs)

    def losses(self, pairs: PairLogps) -> Tensor:
        """The objective's, `[B]`; what it does across processes counts those once that have the same pairs."""
        shard = self.policy.shard
        same = shard.group if isinstance(shard, VocabShard) else None
        groups = [group for group in (same, self.layout.group) if group is not None]
        if not groups:  # torch.compile does not trace the context
            return pair_losses(self.objective, pairs)
        with same_pairs(*groups):
            return pair_losses(self.objective, pairs)

    def call(self) -> LogprobCall:
        """The policy's log-probabilities, and the outputs that objective and metrics want."""
        wanted = [name for name in self.token_outputs if name in OUTPUTS]
        outputs = (*wanted, *(("correct", "entropy", "mean_logit") if self.token_metrics else ()))
        return LogprobCall.of(self.policy, self.tokens, self.layout.shift, self.execution, outputs)


@dataclass(frozen=True)
class _Taken:
    """Which tokens take part in the policy's products."""

    computed: Tensor  # labels' shape, bool
    lengths: Tensor  # [2B] how many of each sequence
    all: bool  # those whose label counts, all of them

    @classmethod
    def of(cls, layout: LabelLayout, counted: Tensor, lengths: Tensor, weights: Tensor | None) -> _Taken:
        """All that count, or those of them whose weight is not 0."""
        if weights is None:
            return cls(counted, lengths, True)
        computed = counted & (weights != 0)
        return cls(computed, layout.count(computed), False)

    def on_host(self, layout: LabelLayout, theirs: Tensor) -> _HostCounts:
        """What the host may know, in one wait for the device; `theirs` (labels' shape) are the reference's tokens."""
        if is_traced(layout.labels):
            return _HostCounts(None, None, None)
        host = layout.known_counts() if self.all else None
        if capturing(layout.labels):
            known = None if host is None else sum(host)
            return _HostCounts(layout.widths() if host is None else host, known, None)
        unknown = [] if host is not None else [self.lengths]
        unknown += [] if theirs is self.computed else [theirs.sum()[None]]
        found = torch.cat(unknown).tolist() if unknown else []
        host = found[: layout.sequences] if host is None else host
        return _HostCounts(host, sum(host), None if theirs is self.computed else found[-1])


class _HostCounts(NamedTuple):
    """None where it is not known."""

    # of each sequence; while a CUDA graph is recorded all its labels are processed, where those that count are unknown
    lengths: list[int] | None
    tokens: int | None  # that take part in the policy's products
    theirs: int | None  # that take part in the reference's, where they are others


def resolve_batch(
    objective: Objective,
    layout: LabelLayout,
    policy: Given,
    reference: Given,
    pair_inputs: Mapping[str, Tensor] | None,
    *,
    reduction: str,
    token_metrics: bool,
    sparsity: str | Sparsity,
    workspace_bytes: int | None,
    backend: str | None,
) -> PairBatch:
    """Check every argument once, and derive what all ways to compute the loss share.

    Waits for a device once at most, for the lengths of the sequences where the host does not have them.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: An argument is wrong; the message names it.
    """
    labels, pairs = layout.labels, layout.check_pairs()
    assert policy.hidden is not None and policy.head is not None
    model = ModelInputs.resolve(policy.hidden, policy.head, labels)
    execution = Execution.resolve(workspace_bytes, backend, model, sparsity)
    of_tokens = _are_of_tokens(reference.logps, layout)
    ref_model = _reference_model(policy, reference, labels, of_tokens)
    names = token_outputs_of(objective)
    shares = None if "chosen_pilot" in (pair_inputs or {}) else token_subsets_of(objective)
    _check_reference(model, ref_model, kl="kl" in names, pilots=shares is not None and not of_tokens)
    named = _pair_inputs(pair_inputs, pairs, labels, model.wide)
    if layout.group is not None:
        execution.check_same("head's sequence_group", layout.group, labels.device)
        _check_draws_none(shares)

    counted = layout.counted()
    lengths = layout.count(counted)
    weights = _constant("token_weights", policy.token_weights, labels)
    ref_weights = _constant("ref_token_weights", reference.token_weights, labels)
    # an objective that asks for sums over tokens asks for all of them; else those of weight 0 enter no product
    every = bool(names) or shares is not None
    taken = _Taken.of(layout, counted, lengths, None if every else weights)
    theirs = taken.computed if every or ref_model is None or ref_weights is None else counted & (ref_weights != 0)
    host = taken.on_host(layout, theirs)
    vocab = min(m.vocab for m in (model, ref_model) if m is not None)
    tokens = Tokens.find(layout, taken.computed, vocab, host.tokens)

    sums, logp = reference.logps, None
    if sums is not None and of_tokens:
        logp = sums.detach().to(model.wide).masked_fill(~counted, 0.0)
    elif ref_model is not None:
        ref_tokens = tokens if theirs is taken.computed else Tokens.find(layout, theirs, vocab, host.theirs)
        ref_execution = Execution.resolve(workspace_bytes, backend, ref_model)
        with torch.no_grad():
            logp, _ = LogprobCall.of(ref_model, ref_tokens, layout.shift, ref_execution).run()
    if logp is not None:
        sums = layout.sum(logp, weights if ref_weights is None else ref_weights)
    pilots = None
    if logp is not None and shares is not None:
        # an objective that draws tokens has all of them computed
        drawn_from = PairTokens.of(layout, counted, host.tokens)
        pilots = Pilots.draw(shares, drawn_from, layout, model, logp)
    sums = None if sums is None else sums.detach().to(model.wide)
    kl = None
    if "kl" in names and ref_model is not None:
        kl = kl_divergence(model, ref_model, tokens, layout.shift, execution)
    return PairBatch(
        objective=objective,
        layout=layout,
        policy=model,
        tokens=tokens,
        lengths=taken.lengths,
        host_lengths=host.lengths,
        token_weights=weights,
        inputs=PairInputs(sums, layout.joined(lengths), named.get("spo_value"), named),
        kl=kl,
        pilots=pilots,
        execution=execution,
        token_metrics=token_metrics,
        reduced=reduction != "none",
        scale=1.0 / max(pairs, 1) if reduction == "mean" else 1.0,
    )


def _are_of_tokens(logps: Tensor | None, layout: LabelLayout) -> bool:
    """Whether the reference's log-probabilities, checked here, are of tokens; else they are sums, or none.

    As many tokens as sequences are taken for sums.
    """
    if logps is None:
        return False
    sums = (layout.sequences,)
    check_vector("ref_logps", logps, layout.labels, sums, layout.labels.shape)
    if logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"ref_logps must be float32 or float64, got {logps.dtype}, in which a sum of log-probabilities is "
            "off by up to 1"
        )
    return logps.shape != sums


def _check_draws_none(shares: object) -> None:
    """Raise ValueError where the objective draws tokens of responses that are on several processes."""
    if shares is not None:
        raise ValueError(
            "the objective draws tokens of whole responses, of which a process of head's sequence_group has a "
            'part: pass pair_inputs["chosen_pilot"] and ["rejected_pilot"]'
        )


def _check_reference(model: ModelInputs, reference: ModelInputs | None, *, kl: bool, pilots: bool) -> None:
    """Raise ValueError or TypeError where the objective needs a reference model that is not there or does not fit."""
    if pilots and reference is None:
        raise ValueError(
            "the objective draws tokens of policy and reference: pass ref_hidden and ref_head, ref_logps of tokens in "
            "labels' shape, or "
            'pair_inputs["chosen_pilot"] and ["rejected_pilot"], see spo_kernels.extras.token_weights.pilots'
        )
    if kl and reference is None:
        raise ValueError("the objective needs the KL divergence from the reference: pass ref_hidden and ref_head")
    if kl and reference is not None:
        model.check_same_vocabulary(reference)


def _reference_model(policy: Given, reference: Given, labels: Tensor, of_tokens: bool) -> ModelInputs | None:
    """The reference's hidden states and head, or None where they were not given."""
    hidden, head = reference.hidden, reference.head
    if reference.logps is not None and not (hidden is head is None):
        raise ValueError("pass either ref_logps, or ref_hidden with ref_head, not both")
    if reference.token_weights is not None and hidden is None and not of_tokens:
        raise ValueError(
            "ref_token_weights needs ref_hidden and ref_head, or ref_logps of tokens in labels' shape: these are summed"
        )
    if hidden is None and head is None:
        return None
    if hidden is None or head is None:
        missing = "ref_head" if head is None else "ref_hidden"
        raise ValueError(f"ref_hidden and ref_head go together; {missing} is missing")
    assert policy.head is not None
    return ModelInputs.resolve_reference(hidden, head, labels, policy.head)


def _constant(name: str, weights: Tensor | None, labels: Tensor) -> Tensor | None:
    """The caller's token weights, checked."""
    if weights is None:
        return None
    check_token_weights(name, weights, labels)
    return weights.detach()


def _pair_inputs(
    named: Mapping[str, Tensor] | None, pairs: int, labels: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The caller's per-pair inputs as constants of the dtype of the sums."""
    if named is None:
        return {}
    if not isinstance(named, Mapping):
        raise TypeError(f"pair_inputs must map names to tensors, got {type(named).__name__}")
    for name, value in named.items():
        check_vector(f"pair_inputs[{name!r}]", value, labels, (pairs,))
    return {name: value.detach().to(dtype) for name, value in named.items()}
