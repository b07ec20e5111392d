"""Tiny models, data and TRL trainers; nothing here touches the network."""

import copy
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

datasets.disable_progress_bars()

VOCAB = 48
WORDS = [f"w{i}" for i in range(2, VOCAB)]
_COMMON = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
_LLAMA_LIKE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2Config", {**_LLAMA_LIKE, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "cohere": ("CohereConfig", {**_LLAMA_LIKE, "logit_scale": 0.25}),
    "mixtral": (
        "MixtralConfig",
        {**_LLAMA_LIKE, "num_local_experts": 3, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}),
}


LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def make_model(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config, settings = MODELS[kind]
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**_COMMON, **settings))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1} | {w: i for i, w in enumerate(WORDS, 2)}, "<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_rows(count: int = 16) -> list[dict[str, str]]:
    """Prompts with a chosen and a rejected response, of different lengths."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    return [
        {"prompt": text(1 + i % 4), "chosen": " " + text(2 + i % 5), "rejected": " " + text(1 + 3 * i % 7)}
        for i in range(count)
    ]


def dataset(columns: str) -> datasets.Dataset:
    rows = make_rows()
    made: dict[str, list[dict[str, Any]]] = {
        "pairs": list(rows),
        "labelled": [
            {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
            for row in rows
            for key in ("chosen", "rejected")
        ],
        "completions": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows],
        "prompts": [{"prompt": row["prompt"]} for row in rows],
    }
    return datasets.Dataset.from_list(made[columns])


def reward(completions: list[str], **_: Any) -> list[float]:
    """Any number that differs between completions."""
    return [float(sum(int(word[1:]) for word in text.split() if word[1:].isdigit()) % 7) for text in completions]


_SAMPLED = {"num_generations": 2, "max_completion_length": 4, "temperature": 0.8, "beta": 0.0, "num_iterations": 2}
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO": ("pairs", {}),
    "KTO": ("labelled", {}),
    "SFT": ("completions", {}),
    "GRPO": ("prompts", _SAMPLED),
    "RLOO": ("prompts", _SAMPLED),
}


def trained_adapter(model: Any) -> Any:
    """The model with an adapter that was trained: it changes what the model does."""
    peft = get_peft_model(model, LoraConfig(**LORA))
    generator = torch.Generator().manual_seed(7)
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(generator=generator)
    return peft


class Run:
    """A short training by TRL: loss of each forward, logged metrics, weights at the start and the end.

    `library` has the trainer and its configuration, TRL if None. `adapter` is "new" (TRL puts it on the model) or
    "trained" (it is there already, and TRL keeps a copy as the reference). `resume` is a checkpoint's folder.
    """

    def __init__(
        self,
        trainer: str,
        kind: str,
        folder: Path,
        *,
        steps: int = 5,
        adapter: str | None = None,
        library: Any = None,
        data: datasets.Dataset | None = None,
        resume: str | None = None,
        **settings: Any,
    ) -> None:
        import trl

        library = library or trl
        columns, defaults = TRAINERS[trainer.removeprefix("Fused")]
        arguments = getattr(library, f"{trainer}Config")(
            output_dir=str(folder),
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=5e-4,
            lr_scheduler_type="constant",
            adam_epsilon=1e-6,
            **{"use_cpu": True, "bf16": False, "save_strategy": "no", **defaults, **settings},
        )
        given: dict[str, Any] = {"reward_funcs": reward} if columns == "prompts" else {}
        model = make_model(kind)
        if adapter == "new":
            given["peft_config"] = LoraConfig(**LORA)
        elif adapter == "trained":
            model = trained_adapter(model)
        elif trainer.removeprefix("Fused") in ("DPO", "KTO"):
            given["ref_model"] = make_model(kind, seed=1)
        made = getattr(library, f"{trainer}Trainer")(
            model=model,
            args=arguments,
            train_dataset=dataset(columns) if data is None else data,
            processing_class=make_tokenizer(),
            **given,
        )
        self.start = copy.deepcopy(made.model.state_dict())
        self.losses: list[float] = []
        compute = made.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            self.losses.append(loss.item())
            return loss

        made.compute_loss = compute_loss
        self.trainer = made
        made.train(resume_from_checkpoint=resume)
        self.logs: list[dict[str, float]] = made.state.log_history[:-1]
        self.end = made.model.state_dict()
