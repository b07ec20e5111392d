"""`python -m spo_kernels doctor`: what it finds, what it advises, and when it ends with an error."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spo_kernels.__main__ import main
from spo_kernels.backends import cpp_extension, registry
from spo_kernels.backends.registration import BackendStatus
from spo_kernels.commands import doctor, self_test

# what a machine with torch alone lacks; an import of one is an error there
_TORCH_ALONE = """
import sys
class Absent:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("transformers", "datasets", "accelerate", "peft", "trl", "triton", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from spo_kernels.__main__ import main
sys.exit(main(["doctor", "--no-test"]))
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller self-test, which is called once."""
    for name, value in (("TOKENS", 40), ("HIDDEN", 16), ("VOCAB", 300), ("SECONDS", 1e-9)):
        monkeypatch.setattr(self_test, name, value)


def found(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    return main(["doctor", *options]), capsys.readouterr().out


def test_healthy(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = found(capsys)
    assert status == 0
    assert f"torch {torch.__version__}" in text and "cores for this process" in text
    for name, state in registry.backend_info().items():
        assert f"  {name:<7}{'yes' if state.available else 'no':<5}{state.detail}" in text
    tested = [line for line in text.splitlines() if line.endswith("right")]
    assert [line.split()[:2] for line in tested[:2]] == [["cpu", "float32"], ["cpu", "bfloat16"]]


def test_a_source_folder_that_hides_the_installed_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = tmp_path / "spo_kernels" / "__init__.py"
    installed.parent.mkdir()
    installed.touch()
    checkout = Path(doctor.__file__).parents[2]
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    monkeypatch.chdir(checkout)
    assert doctor._hidden_package() == installed.parent
    monkeypatch.setattr(sys, "path", ["", str(checkout)])
    assert doctor._hidden_package() is None
    monkeypatch.setattr(sys, "path", ["", str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    assert doctor._hidden_package() is None


def test_which_product_is_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not registry.backend_info()["cpp"].available:
        pytest.skip(registry.backend_info()["cpp"].detail)
    for product, expected in (("vendor", "float32 cpp with torch products"), ("native", "float32 cpp with avx")):
        monkeypatch.setenv("SPO_CPU_PRODUCT", product)
        registry.load_backend.cache_clear()
        assert expected in found(capsys, "--no-test")[1]
    registry.load_backend.cache_clear()


def test_torch_alone() -> None:
    run = subprocess.run([sys.executable, "-c", _TORCH_ALONE], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    assert "transformers" in run.stdout and "triton cannot be imported" in run.stdout


def _half_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return self_test._plain(hidden.bfloat16(), weight.bfloat16(), labels)


def _no_label(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logp = self_test._plain(hidden, weight, labels)
    return (
        logp.detach() - (hidden @ weight.T).float().logsumexp(-1) + (hidden @ weight.T).float().logsumexp(-1).detach()
    )


def _nan(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return self_test._plain(hidden, weight, labels) * float("nan")


@pytest.mark.parametrize("wrong", [_half_logits, _no_label, _nan], ids=["values", "gradients", "nan"])
def test_a_wrong_result_is_an_error(
    wrong: Callable[..., Any], quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(self_test, "linear_logprob", wrong)
    status, text = found(capsys)
    assert status == 1 and "WRONG" in text and "is wrong here: please report it" in text


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("SPO_BACKEND", "cuda", "SPO_BACKEND = 'cuda' cannot be used: it runs on an NVIDIA GPU"),
        ("SPO_CPU_ISA", "abacus", "SPO_CPU_ISA = 'abacus'"),
        ("SPO_BACKEND", "abacus", "SPO_BACKEND = 'abacus' is not a backend"),
    ],
)
def test_what_the_environment_asks_for_is_not_there(
    variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpp_extension.load.cache_clear()
    monkeypatch.setenv(variable, value)
    status, text = found(capsys)
    cpp_extension.load.cache_clear()
    assert status == 1 and reason in text


def test_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault has its line, and a machine without faults has none."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.Path, "exists", lambda path: False)
    monkeypatch.setattr(doctor, "_cores", lambda: 64)
    well = dict.fromkeys(("torch", "cpp", "triton", "cuda"), BackendStatus(True, "prebuilt, AVX2, OpenMP"))
    trl = {"trl": doctor.TESTED[0]}

    def advice(*machine: Any) -> str:
        return "\n".join(doctor._advice(*machine, []))

    assert advice(well, trl) == ""
    absent = BackendStatus(False, "no C++ compiler on PATH")
    assert "pip install ninja pybind11" in advice({**well, "cpp": absent}, trl)
    slow = BackendStatus(True, "prebuilt, AVX2, one thread")
    assert "-fopenmp" in advice({**well, "cpp": slow}, trl)
    assert "TRL 0.9 was not tested" in advice(well, {"trl": "0.9"})
    monkeypatch.setattr(doctor, "_cores", lambda: 0)
    assert "OMP_NUM_THREADS=0" in advice(well, trl)
    monkeypatch.setattr(doctor, "_cores", lambda: 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    neither = {**well, "triton": absent, "cuda": absent}
    assert "neither triton nor cuda" in advice(neither, trl)


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2 and "COMMAND" in capsys.readouterr().err
