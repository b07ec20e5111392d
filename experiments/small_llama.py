"""A random Llama with a tokenizer trained on prompts and completions, in a folder as transformers loads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; a head has 64 components."""

    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 704
    layers: int = 4
    positions: int = 640


def build_model(folder: Path, corpus: Path, shape: Shape, seed: int = 0) -> int:
    """Byte-level BPE on the corpus and a model of random weights; returns its parameters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

    tokenizer = Tokenizer(models.BPE())
    # Digits one by one, as maths models do.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").split("\n") if line]
    tokenizer.train_from_iterator((row[key] for row in rows for key in ("prompt", "completion")), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)

    set_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.hidden // 64,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model.num_parameters()
