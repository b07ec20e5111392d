"""Fused LM-head log-probabilities and preference losses for PyTorch; no full-vocabulary logits."""

from spo_kernels import startup  # noqa: F401 before the slow imports
from spo_kernels._version import __version__
from spo_kernels.backends.registry import BackendStatus, backend_info
from spo_kernels.head import LMHead, LoRA
from spo_kernels.kl import linear_kl
from spo_kernels.logprob import linear_logprob, linear_token_loss
from spo_kernels.loss import fused_spo_loss
from spo_kernels.sequences import sequence_logps
from spo_kernels.sparsity import Sparsity

__all__ = [
    "BackendStatus",
    "LMHead",
    "LoRA",
    "Sparsity",
    "__version__",
    "backend_info",
    "fused_spo_loss",
    "linear_kl",
    "linear_logprob",
    "linear_token_loss",
    "sequence_logps",
]
