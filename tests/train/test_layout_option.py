"""`--layout`: rows without padding train as padded ones do, and the backbone sees fewer tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from spo_kernels.train.policy import Policy

from .conftest import Train, read_metrics, read_weights

OPTIONS = ("--max-steps", 4, "--batch-size", 4, "--learning-rate", 5e-4, "--logging-steps", 1)


def test_a_run_without_padding_is_the_padded_one(
    train: Train, tmp_path: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: dict[str, int] = {}
    forward, layouts = Policy.forward, iter(("auto", "padded"))

    def counted(self: Policy, *arguments: object, **more: object) -> object:
        def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            tokens[name] = tokens.get(name, 0) + inputs[0].shape[:-1].numel()

        hook = self.model.model.layers[0].mlp.register_forward_pre_hook(count)
        try:
            return forward(self, *arguments, **more)
        finally:
            hook.remove()

    monkeypatch.setattr(Policy, "forward", counted)
    found = {}
    for name in layouts:
        folder = tmp_path / name
        assert train(*OPTIONS, "--loss", "spo", "--layout", name, dataset=pairs_file, output_dir=folder) == 0
        found[name] = [record["loss"] for record in read_metrics(folder, "train")], read_weights(folder)
    (losses, weights), (padded_losses, padded) = found["auto"], found["padded"]
    assert len(losses) == 4 and losses == pytest.approx(padded_losses, rel=1e-5)
    for key, value in padded.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6)
    assert tokens["auto"] < 0.9 * tokens["padded"]
