"""The DPO script of TRL's documentation, on local data and a local model, as a program of its own: as it is, with one
line added, with one import changed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 or newer is not installed")

from tests.integrations.tiny import make_model, make_rows, make_tokenizer
from tests.tree import ROOT

STEPS = 3
IMPORT = "from trl import DPOConfig, DPOTrainer\n"
ADDED = "from spo_kernels.integrations.trl import patch_trl; print(patch_trl())\n"
CHANGED = "from spo_kernels.integrations.trl import FusedDPOConfig as DPOConfig, FusedDPOTrainer as DPOTrainer\n"
SCRIPT = f"""\
from datasets import load_dataset
{IMPORT}
trainer = DPOTrainer(
    model="model",
    args=DPOConfig("output", max_steps={STEPS}, learning_rate=5e-4, logging_steps=1, bf16=False, report_to="none"),
    train_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"),
)
trainer.train()
trainer.save_state()
"""


def run(script: str, folder: Path) -> tuple[str, list[float]]:
    """What the script printed, and the loss of each step."""
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    (folder / "dpo.py").write_text(script)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "dpo.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    log = json.loads((folder / "output/trainer_state.json").read_text())["log_history"]
    return done.stdout, [entry["loss"] for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    losses = run(SCRIPT, tmp_path_factory.mktemp("as-it-is"))[1]
    assert len(losses) == STEPS and len({round(loss, 3) for loss in losses}) > 1
    return losses


def test_one_line_added(expected: list[float], tmp_path: Path) -> None:
    printed, losses = run(SCRIPT.replace(IMPORT, IMPORT + ADDED), tmp_path)
    assert "computes its fused head with spo_kernels" in printed
    assert losses == pytest.approx(expected, rel=1e-5)


def test_one_import_changed(expected: list[float], tmp_path: Path) -> None:
    assert run(SCRIPT.replace(IMPORT, CHANGED), tmp_path)[1] == pytest.approx(expected, rel=1e-5)
