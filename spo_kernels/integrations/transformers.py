"""Preference losses for transformers models in any training loop: what a loop needs around `fused_spo_loss`."""

from spo_kernels.integrations.hidden import hidden_states
from spo_kernels.integrations.pairs import PairCollator, precompute_ref_logps
from spo_kernels.integrations.preference_model import FusedPreferenceModel
from spo_kernels.integrations.sharded_head import shard_head
from spo_kernels.integrations.token_batches import TokenBatchSampler

__all__ = [
    "FusedPreferenceModel",
    "PairCollator",
    "TokenBatchSampler",
    "hidden_states",
    "precompute_ref_logps",
    "shard_head",
]
