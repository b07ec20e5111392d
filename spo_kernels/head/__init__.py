"""A language model's head as one value: its weight, what is added to and made of its logits, and who has its rows."""

from spo_kernels.head.lm_head import LMHead, LoRA, as_head, check_linear, inner_model, logit_transform, sequence_group

__all__ = ["LMHead", "LoRA", "as_head", "check_linear", "inner_model", "logit_transform", "sequence_group"]
