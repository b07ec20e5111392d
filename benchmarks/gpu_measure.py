"""Time with a cold L2 cache, peak memory by the allocator's counters, and errors against float64; CUDA or CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from .gpu_settings import GRADIENT_ROWS, ORACLE_ROWS
from .inputs import LOGIT_STD, Problem, as_problem, lm_hidden_weight
from .oracle import relative, solve
from .settings import Setting
from .variant import Step

# larger than any L2: 50 MB on an H100, 126 MB on a B200
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Sample:
    """Milliseconds of a step, and of one bare product beside it."""

    ms: list[float]
    product_ms: list[float]

    def summary(self) -> dict[str, float]:
        ordered = sorted(self.ms)
        last = len(ordered) - 1
        bare = median(self.product_ms)
        return {
            "ms": median(ordered),
            "ms_p20": ordered[round(0.2 * last)],
            "ms_p80": ordered[round(0.8 * last)],
            "samples": len(ordered),
            "product_ms": bare,
            "ge": median(ordered) / bare,
        }


class Stopwatch:
    """Times one call after the cache was overwritten.

    The step is launched into an idle stream, as in a training loop that has just been synchronised: for small shapes
    the time is the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self._cuda else 1, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object], *, hide_launch: bool = False) -> float:
        """Milliseconds. With `hide_launch` the device is kept busy while the host launches: kernels alone are timed."""
        self._flush.zero_()
        if not self._cuda:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        if hide_launch:
            for _ in range(4):  # 80 us each on an H100
                self._flush.zero_()
        else:
            torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def sample(
    run: Callable[[], object],
    product: Callable[[], object],
    clear: Callable[[], None],
    clock: Stopwatch,
    *,
    repeats: int,
    seconds: float,
) -> Sample:
    """Alternates step and bare product: as often as `seconds` allow, 3 times at least, `repeats` at most."""
    ms, bare = [], []
    until = time.monotonic() + seconds
    while len(ms) < repeats and (len(ms) < 3 or time.monotonic() < until):
        clear()
        ms.append(clock(run))
        bare.append(clock(product))
    clear()
    return Sample(ms, bare)


def peak_bytes(run: Callable[[], object], clear: Callable[[], None], device: torch.device) -> int | None:
    """The allocator's peak during one call, over what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    clear()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    clear()
    return peak - before


def make_problem(setting: Setting, device: torch.device) -> Problem:
    """Hidden states, a head, and labels drawn from their own softmax: the same in every process."""
    generator = torch.Generator(device).manual_seed(setting.seed)
    shape = (2 * setting.pairs, setting.tokens)
    options = {"generator": generator, "device": device, "dtype": setting.torch_dtype}
    if setting.logits == "lm":
        hidden, weight = lm_hidden_weight(setting, device)
    else:
        hidden = torch.randn(*shape, setting.hidden, **options)
        weight = torch.randn(setting.vocab, setting.hidden, **options) * (LOGIT_STD * setting.hidden**-0.5)
    rows = max(1, min(1024, (1 << 30) // (4 * setting.vocab)))
    draws = [
        torch.multinomial((piece @ weight.t()).float().softmax(-1), 1, generator=generator)[:, 0]
        for piece in hidden.flatten(0, 1).split(rows)
    ]
    return as_problem(setting, hidden, weight, torch.cat(draws).view(shape))


@torch.no_grad()
def true_logps(problem: Problem, rows: int) -> Tensor:
    """Float64 log-probs of the first `rows` labels, vocabulary slice by slice."""
    hidden = problem.hidden.flatten(0, 1)[:rows].double()
    labels = problem.labels.flatten()[:rows, None]
    lse = torch.full((hidden.shape[0],), -torch.inf, dtype=torch.float64, device=hidden.device)
    target = torch.zeros_like(lse)
    for start in range(0, problem.weight.shape[0], 16384):
        logits = hidden @ problem.weight[start : start + 16384].double().t()
        lse = torch.logaddexp(lse, logits.logsumexp(1))
        inside = (labels >= start) & (labels < start + logits.shape[1])
        picked = logits.gather(1, (labels - start).clamp(0, logits.shape[1] - 1))
        target += torch.where(inside, picked, 0.0)[:, 0]
    return target - lse


def errors(problem: Problem, step: Step) -> dict[str, float | None]:
    """Worst token and worst 512-token sum in nats; relative error of dH and dW where float64 gradients are cheap."""
    setting = problem.setting
    found: dict[str, float | None] = dict.fromkeys(("token", "sum512", "dh", "dw"))
    if step.tokens is not None:
        truth = true_logps(problem, min(ORACLE_ROWS, setting.rows))
        ours = step.tokens().flatten()[: truth.numel()]
        found["token"] = (ours.double() - truth).abs().max().item()
        span = min(512, setting.tokens)
        whole = truth.numel() // span * span
        # summed as the losses sum them: in float32
        sums = ours[:whole].float().view(-1, span).sum(1).double() - truth[:whole].view(-1, span).sum(1)
        found["sum512"] = sums.abs().max().item()
    if setting.rows <= GRADIENT_ROWS:
        truth = solve(problem)
        problem.clear()
        step.run()
        found["dh"] = relative(problem.hidden.grad, truth.dh)
        found["dw"] = relative(problem.weight.grad, truth.dw) if truth.dw is not None else None
        problem.clear()
    return found
