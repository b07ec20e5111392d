"""The training loop: evaluate, log, save, step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from spo_kernels.integrations.token_batches import step_indices
from spo_kernels.losses.reconstructed.spo import SPO_VALUE
from spo_kernels.losses.state import has_state
from spo_kernels.train.checkpoint import (
    Checkpoint,
    capture_rng,
    reading,
    restore_rng,
    restore_weights,
    save_checkpoint,
    trained_weights,
)
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.errors import TrainError
from spo_kernels.train.forwards import Forwards
from spo_kernels.train.inner import InnerSteps
from spo_kernels.train.metrics import MetricsLog, Window, peak_memory_mib
from spo_kernels.train.mismatched import MISMATCHED
from spo_kernels.train.sharded import load_optimizer_state, optimizer_state, whole
from spo_kernels.train.signals import BEFORE_THE_FIRST_STEP, Stopped, StopSignals
from spo_kernels.train.splits import Split
from spo_kernels.train.together import together


@dataclass
class Trainer:
    """All that a step needs. `policy`, `optimizer` come from accelerator.prepare; `scheduler` does not."""

    config: TrainConfig
    accelerator: Any
    policy: Any
    optimizer: Any
    scheduler: Any
    train: Split
    evaluation: Split | None
    output: Path
    identity: dict[str, Any]
    max_steps: int
    forwards: Forwards
    inner: InnerSteps | None = None
    stop: StopSignals = field(default_factory=StopSignals)
    warn: Callable[[str], None] = print
    step: int = 0
    window: Window = field(default_factory=Window)

    @property
    def per_step(self) -> int:
        """Records in an optimizer step, over all processes."""
        return self.config.batch_size * self.config.grad_accum * self.accelerator.num_processes

    def run(self, checkpoint: Checkpoint | None) -> None:
        """Train from the start or from a checkpoint up to max_steps; a signal raises Stopped after the step."""
        with together(self.accelerator):
            due = self.step == 0 if checkpoint is None else self._restore(checkpoint)
            if checkpoint is not None:
                self.warn(f"going on from step {self.step} of {self.max_steps}")
            self.stop.finish_first = True
            log = MetricsLog(self.output, self.warn, -1 if checkpoint is None else self.step) if self._is_main else None
        if due and not self._evaluate(log):
            self._leave()
        config, started = self.config, time.perf_counter()
        with self._progress() as bar:
            while self.step < self.max_steps:
                grad_norm = self._optimizer_step()
                self.step += 1
                bar.update()
                last = self.step == self.max_steps
                if last or self.step % config.logging_steps == 0:
                    self._log(log, bar, time.perf_counter() - started, grad_norm)
                    started = time.perf_counter()
                paused = time.perf_counter()
                due = last or bool(config.eval_steps and self.step % config.eval_steps == 0)
                if due:
                    due = not self._evaluate(log)
                stopped = self.stop.agreed(self.accelerator)
                if stopped or (config.save_steps and (last or self.step % config.save_steps == 0)):
                    self._save(due)
                if stopped and (due or not last):
                    self._leave()
                started += time.perf_counter() - paused

    def _leave(self) -> NoReturn:
        number = self.stop.agreed(self.accelerator) or 0
        state = f"stopped after step {self.step} of {self.max_steps}, which is saved"
        state = f"{state}; the same command with --resume goes on" if self.step else BEFORE_THE_FIRST_STEP
        raise Stopped(number, state if self._is_main else "")

    def _optimizer_step(self) -> Tensor | float | None:
        config, accelerator = self.config, self.accelerator
        indices = step_indices(self.step, len(self.train.examples), self.per_step, config.seed)
        # Forwards of similar lengths pad less: 0.67 x the positions on GSM8K pairs, 4 forwards of 4.
        indices = self.train.by_length(indices)
        units = self.train.units(indices, per_token=config.stage == "sft")
        # The loss is a mean over all units of the step, wherever they are: DDP averages gradients over
        # processes, which is turned back into a sum.
        scale = accelerator.num_processes / units
        self.policy.train()
        mine = self.forwards.of(self.train.examples, indices, accelerator.process_index, accelerator.num_processes)
        for number, micro in enumerate(mine, 1):
            # Processes may have different numbers of forwards; they meet in the backward of the last one.
            with accelerator.no_sync(self.policy) if number < len(mine) else nullcontext():
                batch = self._batch(self.train, micro, training=True)
                loss, sums, pair_logps = self.policy(**batch)
                accelerator.backward(loss * scale)
                self.window.add(sums)
                self._add_pairs(self.window, self.train, micro, pair_logps)
        grad_norm = None
        if config.max_grad_norm:
            grad_norm = accelerator.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.window.count(units, sum(self.train.examples[i].tokens for i in indices))
        return grad_norm

    @torch.no_grad()
    def _evaluate(self, log: MetricsLog | None) -> bool:
        """Every held-out record once; the window of the training metrics is not touched. False: a signal came first."""
        if self.evaluation is None:
            return True
        accelerator, window = self.accelerator, Window()
        policy = accelerator.unwrap_model(self.policy)
        policy.eval()
        everything = self.evaluation.by_length(range(len(self.evaluation.examples)))
        world = range(accelerator.num_processes)
        shares = [self.forwards.of(self.evaluation.examples, everything, rank, len(world)) for rank in world]
        mine, most = shares[accelerator.process_index], max(len(share) for share in shares)
        # A model in parts needs all processes in each forward; what is evaluated twice counts once.
        for batch in [*mine, *[None] * (most - len(mine))]:
            if self.stop.agreed(accelerator):
                return False
            arguments = self._batch(self.evaluation, batch or everything[:1], training=False)
            with accelerator.autocast():
                _, sums, pair_logps = policy(**arguments)
            window.add(sums if batch else {name: torch.zeros_like(value) for name, value in sums.items()})
            if batch:
                self._add_pairs(window, self.evaluation, batch, pair_logps)
        window.count(self.evaluation.units(everything, per_token=self.config.stage == "sft"), 0)
        means = window.means(accelerator) | window.diagnostics()
        with together(accelerator):
            if log is not None:
                log.write({"step": self.step, "split": "eval", **means})
        return True

    def _batch(self, split: Split, indices: list[int], training: bool) -> dict[str, Any]:
        """Keyword arguments of Policy.forward, with the inputs that the policy itself is needed for."""
        batch = split.batch(indices, self.accelerator.device)
        policy, found = self.accelerator.unwrap_model(self.policy), batch.get("pair_inputs", {})
        if split.mismatched is not None:
            found = {**found, MISMATCHED: split.mismatched.ratios(policy, indices, self.accelerator)}
        if self.inner is not None:
            # evaluation: processes may have different numbers of batches, so each steps on its own
            found = {**found, SPO_VALUE: self.inner.values(policy, batch, self.accelerator, shared=training)}
        return {**batch, "pair_inputs": found} if found else batch

    def _add_pairs(self, window: Window, split: Split, indices: list[int], pair_logps: Tensor | None) -> None:
        if split.baseline is None or pair_logps is None:
            return
        lengths = [[split.examples[i].response_length(k) for i in indices] for k in range(2)]
        window.add_pairs(pair_logps, split.baseline[indices].T.reshape(-1), torch.tensor(lengths).flatten())

    def _log(self, log: MetricsLog | None, bar: Any, seconds: float, grad_norm: Any) -> None:
        means = self.window.means(self.accelerator) | self.window.diagnostics()
        record = {
            "step": self.step,
            "split": "train",
            "epoch": self.step * self.per_step / len(self.train.examples),
            **means,
            "lr": self.scheduler.get_last_lr()[0],
            "tokens_per_second": self.window.tokens / seconds,
            "peak_memory_mib": peak_memory_mib(self.accelerator.device),
        }
        if grad_norm is not None:
            record["grad_norm"] = float(whole(grad_norm))
        self.window = Window()
        with together(self.accelerator):
            self._check_finite(means["loss"])
            if log is not None:
                log.write(record)
                bar.set_postfix(_short(record))

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainError(
                f"the loss became {loss} at step {self.step} or shortly before; the last checkpoint is from "
                "before that; a lower --learning-rate or a longer --warmup-steps may help"
            )

    def _save(self, evaluation_due: bool) -> None:
        window = self.window.state_dict()
        means = self.window.means(self.accelerator)
        policy = self.accelerator.unwrap_model(self.policy)
        objective = policy.objective.state_dict() if has_state(policy.objective) else {}
        each = gather_object([{"rng": capture_rng(), "window": window, "objective": objective}])
        weights = trained_weights(policy.model, keep=self._is_main)
        optimizer = optimizer_state(self.optimizer, keep=self._is_main)
        with together(self.accelerator):
            if means:
                self._check_finite(means["loss"])
            if self._is_main:
                state = {
                    "optimizer": optimizer,
                    "scheduler": self.scheduler.state_dict(),
                    "evaluation due": evaluation_due,
                    "processes": each,
                }
                keep = self.config.keep_checkpoints
                save_checkpoint(self.output, self.step, weights, state, self.identity, keep)

    def _restore(self, checkpoint: Checkpoint) -> bool:
        """Whether the evaluation of the checkpoint's step is still to be done."""
        policy = self.accelerator.unwrap_model(self.policy)
        restore_weights(policy.model, checkpoint.weights(), checkpoint.path)
        with reading(checkpoint) as state:
            load_optimizer_state(self.optimizer, state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            # A finished run's rate was the last of a shorter schedule; any other's is the same bits again.
            for group, rate, factor in zip(
                self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = rate * factor(checkpoint.step)
            own = state["processes"][self.accelerator.process_index]
            self.window.load_state_dict(own["window"], self.accelerator.device)
            if own["objective"]:
                policy.objective.load_state_dict(own["objective"])
            restore_rng(own["rng"])
            self.step = checkpoint.step
            return bool(state.get("evaluation due"))

    def _progress(self) -> Any:
        hidden = self.config.quiet or not self._is_main
        return tqdm(total=self.max_steps, initial=self.step, desc=self.config.stage, disable=hidden)

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process


_SHORT = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "acc",
    "mean_token_accuracy": "acc",
}


def _short(record: dict[str, Any]) -> dict[str, str]:
    """What fits beside a progress bar."""
    shown = {short: f"{record[name]:.4g}" for name, short in _SHORT.items() if name in record}
    shown["tok/s"] = f"{record['tokens_per_second']:.0f}"
    return {**shown, "MiB": f"{record['peak_memory_mib']:.0f}"}
