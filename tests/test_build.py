"""The extensions' recipes, and what the cuda backend says where it is missing; needs neither nvcc nor a GPU."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch

from spo_kernels.backends import build, cuda_extension

ROOT = Path(__file__).parent.parent


def test_recipes_name_every_file():
    """A source that no list has would be missing in an installed package only, a header from the cache's key."""
    listed = {*build.SOURCES, *build.HEADERS, *build.CUDA_SOURCES, *build.CUDA_HEADERS}
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert listed == found


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_changed_header_is_compiled_again(tmp_path):
    source, header, library = tmp_path / "say.cpp", tmp_path / "say.h", tmp_path / "say"
    source.write_text('#include "say.h"\nint main() { return WHAT; }\n')
    commands = {"compile": {".cpp": f"{build.compiler()} -c $in -o $out"}, "link": f"{build.compiler()} $in -o $out"}
    recipe = build.Recipe("say", tmp_path, sources=("say.cpp",), headers=("say.h",), identity=(), **commands)
    for value in (3, 4):
        header.write_text(f"#define WHAT {value}\n")
        os.utime(header, (header.stat().st_mtime + value,) * 2)  # also where a file system's clock is coarse
        build.run_ninja(recipe, tmp_path, library)
        assert subprocess.run([library]).returncode == value


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("90", ["-gencode=arch=compute_90,code=sm_90"]),
        ("8.0;90a", ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]),
        ("100+PTX", ["-gencode=arch=compute_100,code=sm_100", "-gencode=arch=compute_100,code=compute_100"]),
    ],
)
def test_architectures(text, flags):
    assert build.gencode_flags(text) == flags


@pytest.mark.parametrize("text", ["", "hopper", "90,80", "9"])
def test_bad_architectures(text):
    with pytest.raises(build.BuildError, match="SPO_CUDA_ARCHS"):
        build.gencode_flags(text)


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """An nvcc that knows what it is told to know."""

    def make(known):
        compiler = tmp_path / "bin" / "nvcc"
        compiler.parent.mkdir(exist_ok=True)
        lines = "".join(f"echo compute_{number}\n" for number in known)
        compiler.write_text(f"#!/bin/sh\n{lines}")
        compiler.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    return make


def test_what_this_nvcc_can_build_for(fake_nvcc):
    """A device's own architecture where nvcc knows it, else PTX of the newest before it; the list likewise."""
    fake_nvcc([75, 80, 86, 90])
    assert [build.architecture_of(c) for c in ((8, 6), (8, 9), (10, 0))] == ["86", "86+PTX", "90+PTX"]
    assert build.known_architectures() == "80;90+PTX"
    with pytest.raises(build.BuildError, match=r"compute capability 7\.0"):
        build.architecture_of((7, 0))
    fake_nvcc([80, 90, 100, 120])
    assert build.known_architectures() == build.CUDA_ARCHITECTURES


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler on PATH")
def test_the_key_covers_architectures_and_compiler(fake_nvcc, tmp_path):
    fake_nvcc([80, 90])
    keys = [build.cuda_recipe(architectures).key() for architectures in ("80", "90", "80")]
    assert keys[0] == keys[2] != keys[1]
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho release 99\n")
    assert build.cuda_recipe("80").key() != keys[0]


def test_processes_that_need_the_same_extension_build_it_once(tmp_path):
    """The second waits for the first, and loads what that has made."""
    script = tmp_path / "build_it.py"
    script.write_text(_BUILD.format(root=str(tmp_path)))
    (tmp_path / "answer.txt").write_text("answer = 42")  # before them: the key is made of what it holds
    environment = {**os.environ, "SPO_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=100)[0].strip() for process in running] == ["42"] * 3
    assert (tmp_path / "built").read_text().splitlines() == ["built"]


# without a compiler: the module is a text, and the "linker" copies it and leaves a line
_BUILD = """
from pathlib import Path
from spo_kernels.backends import build

root = Path({root!r})
copy = "sleep 0.5 && cp $in $out"
link = f"{{copy}} && echo built >> {{root}}/built"
recipe = build.Recipe("answer", root, ("answer.txt",), (), {{".txt": copy}}, link, ())
build._import_from = lambda library, name: print(library.read_text().split()[-1])
build.load_or_build(recipe)
"""


@pytest.mark.parametrize(
    "refusal", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")], ids=repr
)
def test_a_file_system_without_locks(tmp_path, monkeypatch, refusal):
    """Every process then builds for itself, and none sees what another has not finished."""

    def refuse(lock, *arguments, **options):
        raise refusal

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    monkeypatch.setattr(build, "_import_from", lambda library, name: library)
    monkeypatch.setenv("SPO_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "answer.txt").write_text("answer = 42")
    recipe = build.Recipe("answer", tmp_path, ("answer.txt",), (), {".txt": "cp $in $out"}, "cp $in $out", ())
    library = build.load_or_build(recipe)
    assert library.read_text() == "answer = 42"
    assert {path.name for path in library.parent.iterdir()} <= {library.name, "lock"}


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SPO_CACHE_DIR", str(blocked))
    (tmp_path / "source.txt").write_text("")
    recipe = build.Recipe("nothing", tmp_path, ("source.txt",), (), {".txt": "true"}, "true", ())
    with pytest.raises(build.BuildError, match=f"cannot write to the cache folder {blocked}"):
        build.load_or_build(recipe)


def test_setup_needs_no_torch():
    """`pip install` builds in an environment that has none, nor filelock."""
    probe = (
        "import sys, runpy; sys.modules.update(torch=None, filelock=None); sys.argv = ['setup.py', '--name'];"
        "scope = runpy.run_path('setup.py'); assert scope['build'].SOURCES; assert not scope['environment'].autotune()"
    )
    environment = {**os.environ, "SPO_SKIP_CUDA_BUILD": "1"}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr


# ---- what is missing, by name


@pytest.fixture
def situation(monkeypatch):
    """torch and nvcc as a test says."""

    def make(built=True, available=True, nvcc="/opt/nvcc"):
        cuda_extension.load.cache_clear()
        monkeypatch.setitem(sys.modules, "spo_kernels._C_cuda", None)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(build, "nvcc", lambda: nvcc)

    yield make
    cuda_extension.load.cache_clear()


def test_reasons(situation, monkeypatch):
    """One for each thing that can be missing, and both where both are."""
    situation(built=False)
    assert "built without CUDA" in cuda_extension.load()[1] and "/opt/nvcc would build it" in cuda_extension.load()[1]
    situation(available=False, nvcc=None)
    assert "sees no NVIDIA GPU" in cuda_extension.load()[1] and "there is no nvcc" in cuda_extension.load()[1]
    situation(nvcc=None)
    assert "none could be built: there is no nvcc" in cuda_extension.load()[1]
    situation(nvcc=None)
    monkeypatch.setenv("SPO_DISABLE_JIT", "1")
    assert "SPO_DISABLE_JIT" in cuda_extension.load()[1]
    situation(available=False)
    monkeypatch.setitem(sys.modules, "spo_kernels._C_cuda", object())
    assert cuda_extension.load()[1].endswith("the extension itself is there (prebuilt)")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    cuda_extension.load.cache_clear()
    assert "AMD" in cuda_extension.load()[1]
    assert all(module is None for module, _ in [cuda_extension.load()])


def test_spo_backend_without_a_gpu_says_so():
    """The whole message, as a user gets it."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    call = "import torch, spo_kernels as s; s.linear_logprob(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]))"
    environment = {**os.environ, "SPO_BACKEND": "cuda", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("RuntimeError: SPO_BACKEND = 'cuda' cannot be used: it runs on an NVIDIA GPU")
    assert "built without CUDA" in message or "sees no NVIDIA GPU" in message
    assert "nvcc" in message or "the extension itself is there" in message
