"""One file reads the environment, and its docstring names every variable."""

import ast
import re
from pathlib import Path

import pytest

from spo_kernels.backends import environment

ROOT = Path(__file__).parent.parent
READER = ROOT / "spo_kernels" / "backends" / "environment.py"


def test_no_other_file_reads_the_environment():
    files = [ROOT / "setup.py", *sorted((ROOT / "spo_kernels").rglob("*.py"))]
    assert READER in files
    reads = re.compile(r"\bos\.environ|\bgetenv|\bimport environ\b|\bfrom os import\b")
    found = [str(path.relative_to(ROOT)) for path in files if path != READER and reads.search(path.read_text())]
    assert found == []


def test_no_extension_reads_the_environment():
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if "getenv" in path.read_text()]
    assert sources == []


def test_the_docstring_names_every_variable():
    tree = ast.parse(READER.read_text())
    # what looks like a variable's name, outside of the docstring
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)][1:]
    read = {value for value in constants if isinstance(value, str) and re.fullmatch(r"[A-Z_]{3,}", value)}
    named = set(re.findall(r"^([A-Z_]{3,})  ", environment.__doc__, re.MULTILINE))
    assert {"SPO_BACKEND", "SPO_CPU_PRODUCT", "SPO_SKIP_CUDA_BUILD", "CUDA_HOME"} <= read
    assert read == named


@pytest.mark.parametrize("value", ["", None])
def test_an_empty_variable_counts_as_none(monkeypatch, value, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        "SPO_BACKEND",
        "SPO_CUDA_ARCHS",
        "SPO_CACHE_DIR",
        "XDG_CACHE_HOME",
        "CXX",
        "CUDA_HOME",
        "SPO_AUTOTUNE",
    ):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert environment.backend_name() is environment.cuda_architectures() is environment.cxx() is None
    assert environment.cuda_home() is None and not environment.autotune()
    assert environment.cache_dir() == tmp_path / ".cache" / "spo_kernels"
