"""Dropout of a loaded model, off: preference losses compare with a reference that has none.

Three forms: modules, numbers that modules keep (`attention_dropout`, `layerdrop`) and numbers that they read in the
configuration at call time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# Names of probabilities and of noise that is only there in training.
_WORDS = ("drop", "jitter")


def switch_off(model: nn.Module) -> None:
    """Every form, in place. `saved_configuration` gives the configuration its numbers back."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in _numbers(module):
            setattr(module, name, 0 * value)
    put_back: list[tuple[Any, str, float]] = []
    for config in _configurations(model.config):
        for name, value in _numbers(config):
            put_back.append((config, name, value))
            setattr(config, name, 0 * value)
    model._spo_dropout = put_back  # type: ignore[assignment]


@contextmanager
def saved_configuration(model: Any) -> Iterator[None]:
    """The model's configuration as it was loaded, for whoever saves the model."""
    put_back = getattr(model, "_spo_dropout", [])
    try:
        for config, name, value in put_back:
            setattr(config, name, value)
        yield
    finally:
        for config, name, value in put_back:
            setattr(config, name, 0 * value)


def _numbers(holder: Any) -> list[tuple[str, float]]:
    """Attributes that are called dropout or the like and hold a probability above 0; MPT has whole ones."""
    return [
        (name, value)
        for name, value in vars(holder).items()
        if isinstance(value, int | float) and 0 < value <= 1 and any(word in name for word in _WORDS)
    ]


def _configurations(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        # Of a text model inside a multimodal one, for example.
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _configurations(value)
