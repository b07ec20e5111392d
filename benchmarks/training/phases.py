"""What a step's seconds go into, by marks that any trainer of a Llama passes."""

from __future__ import annotations

import time
from typing import Any

# the head's: loss and both of its passes; the optimizer's: clipping too; data's: everything else, logging too
PHASES = ("data", "backbone forward", "head", "backbone backward", "optimizer")


class Phases:
    """Each mark ends a phase, which gets the seconds since the mark before."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def end(self, phase: str) -> None:
        """A phase is over."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def watch(self) -> None:
        """Set the marks, in all models of this process."""
        from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
        from transformers import LlamaModel

        def before(module: Any, _: Any) -> None:
            if isinstance(module, LlamaModel):
                self.end("data")

        def after(module: Any, _: Any, output: Any) -> None:
            if isinstance(module, LlamaModel):
                self.end("backbone forward")
                if output.last_hidden_state.requires_grad:
                    output.last_hidden_state.register_hook(self._backward)

        register_module_forward_pre_hook(before)
        register_module_forward_hook(after)

    def _backward(self, _: Any) -> None:
        from torch.autograd import Variable

        self.end("head")
        Variable._execution_engine.queue_callback(lambda: self.end("backbone backward"))
