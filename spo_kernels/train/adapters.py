"""PEFT adapters as the model to train, and where adapters would not mean what they seem to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from spo_kernels.train.errors import TrainError


def base_of_adapter(name: str) -> str | None:
    """The base model that an adapter, in a folder or on the hub, belongs to; None for anything else."""
    from transformers.utils import find_adapter_config_file

    folder = Path(name).expanduser()
    try:
        path = find_adapter_config_file(str(folder) if folder.is_dir() else name)
    # No such name, no network: loading it as a model will say so.
    except Exception:
        return None
    if path is None:
        return None
    try:
        base = json.loads(Path(path).read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainError(f"{path}: not an adapter's configuration: {type(error).__name__}: {error}") from error
    if not isinstance(base, str) or not base:
        raise TrainError(f"{path}: base_model_name_or_path must name the base model, got {base!r}")
    return base


def load_adapter(base: nn.Module, name: str, trained: bool) -> Any:
    """The base with the adapter on it, which is what is trained."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise TrainError(f"{name} is a PEFT adapter, which needs the package peft: pip install peft") from error
    folder = str(Path(name).expanduser())
    try:
        settings = PeftConfig.from_pretrained(folder)
        if settings.is_prompt_learning:
            raise TrainError(f"{name}: a {settings.peft_type} adapter changes the input, which is not supported")
        model = PeftModel.from_pretrained(base, folder, is_trainable=trained)
    except TrainError:
        raise
    # Missing or damaged weights, or those of another base.
    except Exception as error:
        raise TrainError(f"adapter {name!r} can't be loaded ({type(error).__name__}): {error}") from error
    check_tied(model, name)
    return model


def check_tied(model: Any, name: str) -> None:
    """An adapter or trained copy on embeddings and head that are tied would change one and not the other.

    Merged, or saved and tied again at the next load, the model would not be the one that was trained.
    """
    inner = model.get_base_model()
    if not getattr(inner.config.get_text_config(), "tie_word_embeddings", False):
        return
    for part, words in (
        (inner.get_input_embeddings(), "embeddings, which are tied to the head"),
        (inner.get_output_embeddings(), "head, which is tied to the embeddings"),
    ):
        if hasattr(part, "base_layer") or hasattr(part, "modules_to_save"):
            raise TrainError(
                f"{name}: an adapter on the {words} (tie_word_embeddings): only one of the two "
                "would change; leave it out"
            )
