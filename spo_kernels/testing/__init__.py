"""Helpers shared by the tests and the benchmarks.

* `eager_logprob`: the plain PyTorch expression with its logits in a chosen precision.
* `Oracle`: that expression in float64, its gradients, and the smallest error worth complaining about.
* `assert_accurate`: element by element, no worse than twice the eager error plus that floor.
* `random_batch`, `peaked_batch`: inputs.  `TensorMeter`: bytes and matrix products, counted.
"""

from spo_kernels.testing.batches import Batch, peaked_batch, random_batch
from spo_kernels.testing.eager import DIFFERENTIABLE, eager_logprob, evaluate, random_upstream
from spo_kernels.testing.meter import TensorMeter
from spo_kernels.testing.oracle import Oracle, assert_accurate, check_linear_logprob, worst_error

__all__ = [
    "DIFFERENTIABLE",
    "Batch",
    "Oracle",
    "TensorMeter",
    "assert_accurate",
    "check_linear_logprob",
    "eager_logprob",
    "evaluate",
    "peaked_batch",
    "random_batch",
    "random_upstream",
    "worst_error",
]
