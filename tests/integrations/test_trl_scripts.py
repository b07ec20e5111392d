"""The DPO script of TRL's documentation, on local data and a local model: as it is; and with one import changed and
with one line added, in this order in one process of their own.
"""

import json
import os
import runpy
from pathlib import Path

import pytest

pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 or newer is not installed")

from tests.integrations.tiny import make_model, make_rows, make_tokenizer
from tests.processes import Forked, exit_codes

STEPS = 3
IMPORT = "from trl import DPOConfig, DPOTrainer\n"
ADDED = "from spo_kernels.integrations.trl import patch_trl; print(patch_trl())\n"
CHANGED = "from spo_kernels.integrations.trl import FusedDPOConfig as DPOConfig, FusedDPOTrainer as DPOTrainer\n"
SCRIPT = f"""\
from datasets import load_dataset
{IMPORT}
trainer = DPOTrainer(
    model="model",
    args=DPOConfig(__name__, max_steps={STEPS}, learning_rate=5e-4, logging_steps=1, bf16=False, report_to="none"),
    train_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"),
)
trainer.train()
trainer.save_state()
"""


def losses_of(output: Path) -> list[float]:
    """The loss of each step."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("scripts")
    make_model("llama").save_pretrained(made / "model")
    make_tokenizer().save_pretrained(made / "model")
    (made / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    return made


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    (folder / "dpo.py").write_text(SCRIPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path("dpo.py", run_name="unchanged")
    losses = losses_of(folder / "unchanged")
    assert len(losses) == STEPS and len({round(loss, 3) for loss in losses}) > 1
    return losses


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """By both scripts."""
    (folder / "changed.py").write_text(SCRIPT.replace(IMPORT, CHANGED))
    (folder / "added.py").write_text(SCRIPT.replace(IMPORT, IMPORT + ADDED))
    process = Forked(folder, run_both, folder)
    assert exit_codes([process], 300) == [0], process.written[1]
    return process.written[0]


def run_both(folder: Path) -> None:
    os.chdir(folder)
    for name in ("changed", "added"):
        runpy.run_path(f"{name}.py", run_name=name)


def test_one_line_added(expected: list[float], printed: str, folder: Path) -> None:
    assert "computes its fused head with spo_kernels" in printed
    assert losses_of(folder / "added") == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("printed")
def test_one_import_changed(expected: list[float], folder: Path) -> None:
    assert losses_of(folder / "changed") == pytest.approx(expected, rel=1e-5)
