"""A loop of one's own with accelerate, LoRA and the base as reference.

accelerate launch -m examples.accelerate_loop MODEL RECORDS.pt OUTPUT, records as `PairCollator` takes them.
"""

import sys

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from spo_kernels.integrations.transformers import FusedPreferenceModel, PairCollator


def main(name: str, records: list[dict[str, list[int]]], output: str, epochs: int = 1, rate: float = 1e-4) -> None:
    accelerator = Accelerator()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), LoraConfig(task_type="CAUSAL_LM"))
    policy = FusedPreferenceModel(model, "dpo", reference="adapters_off")
    optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), rate)
    loader = DataLoader(records, batch_size=4, shuffle=True, collate_fn=PairCollator(pad_token_id=0))
    policy, optimizer, loader = accelerator.prepare(policy, optimizer, loader)
    for batch in (batch for _ in range(epochs) for batch in loader):
        loss, metrics = policy(**batch)  # the wrapped module, not policy.module
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"loss {loss:.4f}, margin {metrics['rewards/margins']:.4f}")
    accelerator.unwrap_model(policy).model.save_pretrained(output)


if __name__ == "__main__":
    main(sys.argv[1], torch.load(sys.argv[2], weights_only=True), sys.argv[3])
