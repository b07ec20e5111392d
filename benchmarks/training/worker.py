"""One trainer, or a floor, in one process: `python -m benchmarks.training.worker JOB.json`.

Answers requests, a JSON object a line: `start` once the warm-up steps are done, `step` after each further step, `end`
after training; `floor` instead of these.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from ..measure import peak_bytes, release_freed_memory, reset_peak, resident_bytes
from ..worker import first_line
from .phases import Phases
from .providers import PROVIDERS, lora_config
from .settings import Job


class Turns:
    """Requests and answers, and the clock: a hook that torch calls after each step of any optimizer."""

    def __init__(self, answers: TextIO, warmups: int) -> None:
        self.answers, self.warmups = answers, warmups
        self.done = 0
        self.phases = Phases()
        self.method = ""
        self.started = 0.0

    def wait(self) -> dict[str, Any]:
        """The next request; the process ends where there is none."""
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        request: dict[str, Any] = json.loads(line)
        return request

    def answer(self, **found: Any) -> None:
        self.answers.write(json.dumps(found) + "\n")
        self.answers.flush()

    def after_step(self, *_: Any) -> None:
        seconds = time.perf_counter() - self.started
        self.phases.end("optimizer")
        self.done += 1
        if self.done < self.warmups:
            return
        if self.done == self.warmups:
            release_freed_memory()
            self.method = "reset" if reset_peak() else "lifetime"
        self.answer(seconds=seconds, phases=self.phases.seconds, peak=peak_bytes(), method=self.method)
        self.wait()
        self.phases.begin()
        self.started = time.perf_counter()


def train(job: Job, turns: Turns) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    run = PROVIDERS[job.provider].load()
    turns.phases.watch()
    register_optimizer_step_post_hook(turns.after_step)
    losses = run(job)
    turns.answer(losses=losses)


def floor(job: Job, turns: Turns) -> None:
    """What a trainer of this kind holds before it has seen a batch."""
    import torch
    from transformers import AutoModelForCausalLM

    PROVIDERS[job.provider].load()
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    if job.tuning == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, lora_config(LoraConfig))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.ones(1, 1, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    release_freed_memory()
    turns.answer(resident=resident_bytes())


def main() -> None:
    # what trainers print must not get between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job.load(Path(sys.argv[1]))
    turns = Turns(answers, job.warmups)
    work = {"start": train, "floor": floor}[turns.wait()["do"]]
    try:
        import torch

        torch.set_num_threads(job.threads)
        work(job, turns)
    except Exception as error:
        traceback.print_exc()
        status = "skipped" if isinstance(error, ImportError) else "failed"
        turns.answer(status=status, reason=first_line(error))


if __name__ == "__main__":
    main()
