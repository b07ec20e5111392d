"""What comes in at the door: tensors that kernels cannot read, and keywords that were there before `LMHead`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spo_kernels import fused_spo_loss, linear_kl, linear_logprob, sequence_logps

HERE = Path(__file__).resolve().parent


def test_every_argument_is_right_or_refused_by_name(backend: str) -> None:
    """In a process of its own: what is wrong here used to end it with a signal."""
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(HERE / "door.py"), backend]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    last = next((line for line in reversed(lines) if line.startswith("case ")), "before the first case")
    assert done.returncode == 0, f"ended with {done.returncode} at {last}\n{done.stderr[-2000:]}"
    wrong = [line for line in lines if line.startswith("WRONG ")]
    assert not wrong, "\n".join([f"{len(wrong)} cases", *wrong[:40]])
    assert int(lines[-1].split()[1]) > 1000


LOOSE = {"bias": "LMHead", "logit_scale": "LMHead", "logit_softcap": "LMHead"}
REMOVED = {
    linear_logprob: LOOSE,
    sequence_logps: LOOSE,
    linear_kl: LOOSE | {"ref_bias": "LMHead"},
    fused_spo_loss: LOOSE | {"ref_weight": "ref_head", "ref_bias": "ref_head", "spo_value": "pair_inputs"},
}


@pytest.mark.parametrize(
    ("function", "keyword", "new"),
    [(function, keyword, new) for function, gone in REMOVED.items() for keyword, new in gone.items()],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_removed_keyword_names_the_new_way(function, keyword, new) -> None:
    hidden, weight, labels = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.int64)
    tensors = (hidden, weight, hidden, weight, labels) if function is linear_kl else (hidden, weight, labels)
    with pytest.raises(TypeError, match=rf"(?s){keyword}\b.*{new}"):
        function(*tensors, **{keyword: torch.ones(5)})
