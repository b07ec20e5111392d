"""The examples of docs/tokens.md run, in the order in which a reader meets them."""

import re
from pathlib import Path

import pytest
import torch

import spo_kernels

PAGE = Path(spo_kernels.__file__).parents[1] / "docs" / "tokens.md"


@pytest.mark.skipif(not PAGE.exists(), reason="an installed package has no docs")
def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["loss"].isfinite() and names["hidden"].grad.any() and names["kept"].unique().numel() == 8
    assert set(names["multipliers"].unique().tolist()) <= {0.0, 1.0} and isinstance(names["advantages"], torch.Tensor)
