"""A loop of one's own with accelerate: LoRA with the base as reference, gradients accumulated and clipped.

accelerate launch -m examples.accelerate_loop MODEL PAIRS.jsonl OUTPUT, pairs with prompt, chosen and rejected.
"""

import sys

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.transformers_trainer import encode
from spo_kernels.integrations.transformers import FusedPreferenceModel, PairCollator


def main(name: str, pairs: str, output: str, epochs: int = 1, rate: float = 1e-4, forwards_per_step: int = 2) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=forwards_per_step)
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = load_dataset("json", data_files=pairs, split="train").map(encode, fn_kwargs={"tokenizer": tokenizer})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), LoraConfig(task_type="CAUSAL_LM"))
    policy = FusedPreferenceModel(model, "dpo", reference="adapters_off")
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate)
    collate = PairCollator(tokenizer.pad_token_id, max_length=1024)
    loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate)
    policy, optimizer, loader = accelerator.prepare(policy, optimizer, loader)
    for batch in (batch for _ in range(epochs) for batch in loader):
        with accelerator.accumulate(policy):
            loss, metrics = policy(**batch)  # the wrapped module, not policy.module
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"loss {loss:.4f}, margin {metrics['rewards/margins']:.4f}")
    accelerator.unwrap_model(policy).model.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:4])
