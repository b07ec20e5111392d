"""spo-train on two processes that FSDP2 gives a part of the model each, as accelerate's launcher tells them to."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.processes import Forked, exit_codes, run_module, torchrun

from .conftest import Fails, Train, assert_close_weights, assert_same_weights, read_metrics, read_weights
from .ranks import WATCHDOG

# what `accelerate config` writes
SETTINGS = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: true}
mixed_precision: 'no'
num_machines: 1
num_processes: 2
"""
OPTIONS = ("--learning-rate", 5e-4, "--schedule", "constant", "--logging-steps", 1)
DPO = ("--loss", "dpo", "--beta", 1)
ONE, TWO = ("--batch-size", 4), ("--batch-size", 2)
# of 13 records to evaluate the second process has 3 batches, the first 4
TEN = ("--max-steps", 10, "--save-steps", 5, "--eval-fraction", 0.27)
FEW = ("--max-steps", 3, "--save-steps", 2, "--grad-accum", 2)
KTO = ("--loss", "kto", "--beta", 1, "--loss-arg", "kl=mismatched", "--eval-fraction", 0.27)
RUNS: dict[str, tuple[Any, ...]] = {
    "dpo": (*DPO, *TEN),
    "copy": (*FEW, "--loss", "tdpo", "--beta", 1, "--loss-arg", "variant=tdpo2", "--reference", "online"),
    "adapters": (*DPO, *FEW, "--lora-r", 4, "--reference", "online", "--gradient-checkpointing", "--weight-decay", 0.1),
    "kto": (*FEW, *KTO),
    "sft": (*FEW, "--stage", "sft"),
}


def launch(folder: Path, jobs: list[dict[str, Any]]) -> tuple[list[int | None], str]:
    """Exit codes of two processes with the variables of accelerate's launcher, and what they said."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "settings.yaml").write_text(SETTINGS)
    command = ["--config_file", str(folder / "settings.yaml"), "--main_process_port", "0", "a_script"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    variables = prepare_multi_gpu_env(arguments)
    ours = {name: value for name, value in variables.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    ranks = [
        Forked(folder, run_module, "tests.train.ranks", folder / "jobs.json", **rank, **ours) for rank in torchrun(2)
    ]
    codes = exit_codes(ranks, WATCHDOG + 60)
    return codes, "".join(rank.written[1] for rank in ranks)


@pytest.fixture(scope="module")
def job(model_dir: Path, pairs_file: Path, sft_file: Path) -> Any:
    def make(name: str, output: Path, *more: Any, **settings: Any) -> dict[str, Any]:
        data = sft_file if name == "sft" else pairs_file
        options = ("--quiet", "--model", model_dir, "--dataset", data, "--output-dir", output)
        arguments = [*options, *OPTIONS, *RUNS[name], *TWO, *more]
        return {"arguments": list(map(str, arguments)), "continues": None, "sharded": True, **settings}

    return make


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, job: Any) -> tuple[Path, str]:
    """A folder with the output of every run, and what was said; in the last one a process was killed in step 6."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [job(name, folder / name) for name in RUNS]
    jobs.append(job("adapters", folder / "adapters-again", "--resume", continues=str(folder / "adapters")))
    jobs.append(job("sft", folder / "sft-ddp", "--resume", continues=str(folder / "sft"), sharded=False))
    jobs.append(job("dpo", folder / "dpo-again", killed=6))
    codes, said = launch(folder, jobs)
    assert codes == [2, -signal.SIGKILL] and (folder / "dpo-again").exists(), said
    return folder, said


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(
    train: Train, model_dir: Path, sft_file: Path, tmp_path: Path, two: tuple[Path, str], name: str
) -> None:
    folder, said = two
    assert train(*OPTIONS, *RUNS[name], *ONE, dataset=sft_file if name == "sft" else None) == 0
    last = max((folder / name).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    assert last is not None, said
    assert "FSDP2" in json.loads((last / "checkpoint.json").read_text())["identity"]["software"]
    one, ours = read_trained(tmp_path / "out"), read_trained(folder / name)
    start = read_weights(model_dir) if name != "adapters" else {key: torch.zeros(()) for key in one if "lora_B" in key}
    moved = sum((one[key] - start[key]).square().sum() for key in start).sqrt()
    apart = sum((one[key] - ours[key]).square().sum() for key in start).sqrt()
    assert moved > 0 and apart <= 1e-3 * moved
    lines, others = read_metrics(tmp_path / "out"), read_metrics(folder / name)
    assert [(line["split"], line["step"]) for line in lines] == [(line["split"], line["step"]) for line in others]
    for a, b in zip(lines, others, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-3)


def read_trained(folder: Path) -> dict[str, torch.Tensor]:
    """As from_pretrained finds them."""
    if (folder / "adapter_config.json").exists():
        return load_file(folder / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_resumed_in_the_middle(two: tuple[Path, str]) -> None:
    """Adapters and their moments are put in parts again, each where it was."""
    folder, said = two
    assert (folder / "adapters-again" / "adapter_model.safetensors").exists(), said
    first, again = (read_trained(folder / name) for name in ("adapters", "adapters-again"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_a_checkpoint_goes_on_under_ddp(two: tuple[Path, str]) -> None:
    folder, said = two
    assert "FSDP2: it will not end with the same bits" in said
    assert_close_weights(folder / "sft", folder / "sft-ddp", atol=1e-6)


def test_killed_and_resumed(two: tuple[Path, str], job: Any) -> None:
    """The others say it; the checkpoint of step 5 leads to the bits of the run that nobody disturbed."""
    folder, said = two
    assert "spo-train: error: another process of this run has ended or cannot be reached; the same command with" in said
    assert not (folder / "dpo-again" / "model.safetensors").exists()
    assert read_metrics(folder / "dpo-again")[-1]["step"] == 5
    codes, said = launch(folder, [job("dpo", folder / "dpo-again", "--resume")])
    assert codes == [0, 0], said
    assert_same_weights(folder / "dpo", folder / "dpo-again")
    assert len(read_metrics(folder / "dpo")) == len(read_metrics(folder / "dpo-again"))


@pytest.mark.parametrize(
    "setting, options, reason",
    [
        ({"FSDP_VERSION": "1"}, (), "fsdp_version 1 is not supported, only 2 is"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, (), "use --gradient-checkpointing"),
        (
            {},
            ("--spo-penalty", "hinge", "--spo-inner-steps", 1, "--spo-inner-lr", 0.1),
            "--spo-inner-steps changes weights within a step and asks autograd for their gradients",
        ),
        ({}, ("--tokens-per-batch", 64), "--tokens-per-batch leaves processes with different numbers of forwards"),
    ],
)
def test_refused(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, setting: dict[str, str], options: tuple[Any, ...], reason: str
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **setting}.items():
        monkeypatch.setenv(name, value)
    assert reason in fails(*options)
