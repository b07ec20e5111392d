"""`FusedDPOTrainer`: TRL's `DPOTrainer` with the loss itself fused."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from spo_kernels.extras.bilevel import bilevel_value
from spo_kernels.extras.token_weights import ld_dpo_weights
from spo_kernels.integrations.at_head import PairLoss, ResponseLogps, add_at_head
from spo_kernels.integrations.layout import layout_of
from spo_kernels.integrations.token_batches import TokenBudget, cpu_budget
from spo_kernels.integrations.trl_config import FusedDPOConfig, objective_of
from spo_kernels.integrations.trl_inputs import (
    WithColumns,
    input_columns,
    refuse,
    refuse_data,
    refuse_fsdp,
    refuse_no_reference,
    why_not_split,
)
from spo_kernels.integrations.trl_metrics import Forward, batch_metrics
from spo_kernels.integrations.trl_parts import lengths_of, parts_of
from spo_kernels.integrations.trl_seam import check_dpo_trainer
from spo_kernels.integrations.wrappers import Sealed
from spo_kernels.losses.needs import needs_reference
from spo_kernels.losses.reconstructed.spo import SPO_VALUE, value_normalization
from spo_kernels.losses.state import has_state
from spo_kernels.sparsity import as_sparsity, of_next_batch

check_dpo_trainer(DPOTrainer)

_STATE_FILE = "objective.safetensors"
# of a batch, what the model does not take
_NOT_THE_MODELS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class FusedDPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer`, whose loss is `fused_spo_loss`: no logits, and three products if the workspace allows.

    Everything else is TRL's and transformers': data, reference (a model, PEFT with its adapters off or a "ref" adapter,
    precomputed), metrics and their names, evaluation, checkpoints, DDP. Takes what `DPOTrainer` takes, with the same
    results; a `FusedDPOConfig` adds our objectives and the fused loss's settings to `DPOConfig`::

        trainer = FusedDPOTrainer(model, args=FusedDPOConfig("out", objective="spo"), train_dataset=pairs)

    An objective that needs no reference loads none, and rewards are logged without it. Columns of the data with the
    names of an objective's `pair_inputs` reach it. Running statistics of an objective are saved in checkpoints.

    Raises:
        ValueError, TypeError: Settings that do not go together, or what cannot be done, with the reason.
    """

    model: Any
    args: Any
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *positional: Any,
        **named: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = FusedDPOConfig(f"{name.split('/')[-1]}-DPO")
        if not isinstance(args, DPOConfig):
            raise TypeError(
                f'args must be a FusedDPOConfig or a DPOConfig, such as FusedDPOConfig("out"), got {args!r}'
            )
        self._objective = objective_of(args)
        self._columns = input_columns(args, self._objective)
        self._referenced = ref_model is not None or needs_reference(self._objective) or not _has_objective(args)
        refuse(args, self._objective, self._referenced)
        data = signature(DPOTrainer).bind_partial(model, ref_model, args, *positional, **named).arguments
        if self._referenced:
            refuse_no_reference(args, model, data)
        for name in ("train_dataset", "eval_dataset"):
            refuse_data(name, data.get(name))
        self._sparsity = as_sparsity(getattr(args, "sparsity", "exact"))
        self._layout = getattr(args, "layout", "auto")
        self._tokens = getattr(args, "tokens_per_batch", None)
        # of the present batch: the forwards that are done, how many there are, and this one's share of the pairs
        self._forwards: list[Forward] = []
        self._parts, self._share = 1, 1.0
        mib = getattr(args, "workspace_mib", None)
        self._options = {} if mib is None else {"workspace_bytes": mib << 20}
        # the precomputation is what keeps TRL from loading a reference
        given = args if self._referenced else _with(args, precompute_ref_log_probs=True)
        super().__init__(model, ref_model, given, *positional, **named)
        if not self._referenced:
            self.args, self.precompute_ref_logps = args, False
        if self._is_vision_dataset:
            raise ValueError("FusedDPOTrainer is for text; use DPOTrainer for data with images")
        if self._columns:
            self.data_collator = WithColumns(self.data_collator, self._columns, self.train_dataset)
        # a router's loss is a statistic of a forward, and FSDP joins all processes in each
        joined = self.aux_loss_enabled or getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        self._may_split = not joined and why_not_split(self.args, self._objective) is None
        add_at_head(self.model)

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers has it; then what a launcher or the settings say about FSDP is checked, and its precision."""
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            return
        refuse_fsdp(self.args, plugin)
        if plugin.mixed_precision_policy is not None:
            # losses, log-probabilities and metrics leave it: in half precision a sum of -300 is off by up to 1
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self._columns if name not in self._signature_columns]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return super()._precompute_ref_logps(dataset, name, batch_size) if self._referenced else dataset

    def compute_ref_log_probs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The reference's log-probabilities of chosen and of rejected responses, `[B]` each."""
        labels = _labels(inputs)
        with self.accelerator.autocast():
            call = ResponseLogps(labels, self._token_weights(labels), self._layout, self._options)
            chosen, rejected = self._reference(model, inputs, call).chunk(2)
        return chosen, rejected

    @torch.no_grad()
    def _reference(self, model: nn.Module, inputs: Mapping[str, Tensor], call: ResponseLogps) -> Tensor:
        add_at_head(model)
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs), self._adapters():
            return model(**self._model_inputs(inputs), at_head=Sealed(call))["logps"]

    @contextmanager
    def _adapters(self) -> Iterator[None]:
        """The policy's adapters as the reference has them, where it is the policy itself."""
        if self.ref_model is not None or not is_peft_model(self.model):
            yield
            return
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
            yield

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """TRL's; with `tokens_per_batch`, and on a CPU, in as many forwards and backwards as the batch needs."""
        hooked = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
        if self._tokens is None and (hooked or not (self._may_split and inputs["input_ids"].is_cpu)):
            return super().training_step(model, inputs, *args, **kwargs)
        if hooked:
            raise ValueError(
                "tokens_per_batch makes several backwards of a batch, and a hook on a parameter, such as a layer-wise "
                "optimizer's, would take a step in each: leave one of them out"
            )
        further = sorted(set(self._model_inputs(inputs)) - {"input_ids", "attention_mask"})
        layout = layout_of(self.accelerator.unwrap_model(model), self._layout, further=further)
        tokens = self._tokens
        budget = cpu_budget(layout, lengths_of(inputs)) if tokens is None else TokenBudget(tokens, layout)
        parts = parts_of(inputs, budget)
        losses = []
        try:
            self._parts = len(parts)
            for number, part in enumerate(parts, 1):
                self._share = len(part["input_ids"]) / len(inputs["input_ids"])
                # processes may have different numbers of forwards; they meet in the last backward
                with self.accelerator.no_sync(model) if number < len(parts) else nullcontext():
                    losses.append(super().training_step(model, part, *args, **kwargs))
        finally:
            self._parts, self._share = 1, 1.0
            self._forwards.clear()
        return torch.stack(losses).sum()

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        labels = _labels(inputs)
        given = self._model_inputs(inputs)
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        call = PairLoss(
            labels,
            self._token_weights(labels),
            self._layout,
            {**self._options, "sparsity": of_next_batch(self._sparsity, self.model.training)},
            objective=self._objective,
            ref_logps=self._ref_logps(inputs, labels, model),
            pair_inputs=self._pair_inputs(inputs, labels),
            # of parts alone, whose tiles are small; a wrapper around the model has hooks where gradients arrive
            accumulate=self._parts > 1 and self.accelerator.distributed_type == DistributedType.NO,
        )
        found = model(**given, at_head=Sealed(call))
        loss = found["loss"]
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * found["aux_loss"]
        self._forwards.append(Forward(found, labels, inputs["attention_mask"]))
        if len(self._forwards) == self._parts:
            self._log_batch(mode)
        if not return_outputs:
            return loss * self._share
        # as in TRL: `compute_metrics` is given logits, which takes a forward of its own
        with torch.no_grad():
            return loss, model(**given, use_cache=False)

    def _ref_logps(self, inputs: Mapping[str, Tensor], labels: Tensor, model: nn.Module) -> Tensor | None:
        """Sums `[2B]` that were precomputed, or those of tokens, shaped like labels."""
        if not self._referenced:
            return None
        if self.precompute_ref_logps:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        with self.accelerator.autocast():
            call = ResponseLogps(labels, layout=self._layout, options=self._options, summed=False)
            return self._reference(model if self.ref_model is None else self.ref_model, inputs, call)

    def _pair_inputs(self, inputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        given = {name: inputs[name] for name in self._columns}
        if getattr(self.args, "spo_inner_steps", 0):
            given[SPO_VALUE] = self._inner_value(inputs, labels)
        return given

    def _inner_value(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """SPO's value of each pair, after inner steps that all processes take together."""
        policy = self.accelerator.unwrap_model(self.model)
        pairs = len(labels) // 2
        labels, weights = labels[:pairs], self._token_weights(labels)
        chosen = {name: value[:pairs] for name, value in self._model_inputs(inputs).items()}
        # chosen responses alone are no pairs
        call = ResponseLogps(labels, None if weights is None else weights[:pairs], "padded", self._options)
        lengths = (labels[:, 1:] != -100).sum(-1).clamp_min(1)
        over = lengths if value_normalization(self._objective) == "mean" else torch.ones_like(lengths)

        def nll(batch: Mapping[str, Tensor]) -> Tensor:
            # a new autocast context each time: within one, half-precision copies of weights are reused
            with self.accelerator.autocast():
                return -policy(**batch, at_head=call)["logps"] / over

        together = self.accelerator.num_processes > 1 and self.model.training
        return bilevel_value(
            policy,
            nll,
            chosen,
            learning_rate=self.args.spo_inner_lr,
            steps=self.args.spo_inner_steps,
            reduce_gradient=partial(self.accelerator.reduce, reduction="mean") if together else None,
        )

    def _token_weights(self, labels: Tensor) -> Tensor | None:
        return None if self.ld_alpha is None else ld_dpo_weights(labels, self.ld_alpha, shift=True)

    def _model_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        left_out = (*_NOT_THE_MODELS, *self._columns)
        return {name: value for name, value in inputs.items() if name not in left_out}

    def _log_batch(self, mode: str) -> None:
        # TRL's rewards have its beta whatever the loss types are; an objective's have its own
        scale = 1.0 if _has_objective(self.args) else self.beta / getattr(self._objective, "beta", 1.0)
        metrics, tokens = batch_metrics(self._forwards, scale, self.accelerator)
        self._forwards.clear()
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if has_state(self._objective) and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            save_file(self._objective.state_dict(), folder / _STATE_FILE)  # type: ignore[attr-defined]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and has_state(self._objective):
            self._objective.load_state_dict(load_file(Path(checkpoint, _STATE_FILE)))  # type: ignore[attr-defined]


def _labels(inputs: Mapping[str, Tensor]) -> Tensor:
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)


def _has_objective(args: Any) -> bool:
    return getattr(args, "objective", None) is not None


def _with(args: DPOConfig, **changes: Any) -> DPOConfig:
    """A copy with these settings; not made anew, which would check and log once more."""
    args = copy.copy(args)
    for name, value in changes.items():
        setattr(args, name, value)
    return args
