"""Checkpoints and metrics that are cut, forged or incomplete: named, and never in the way."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spo_kernels.train import checkpoint as checkpoint_module
from spo_kernels.train.checkpoint import newest_checkpoint, save_checkpoint

from .conftest import Fails, Train, assert_same_weights
from .test_resume import OPTIONS, interrupted, stop_after, without_times

__all__ = ["stop_after"]
pytestmark = pytest.mark.usefixtures("shared_references")
Left = Callable[[int], None]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For runs that several tests begin with."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def left(train: Train, stop_after: Any, tmp_path: Path, kept: Path) -> Left:
    """left(5): what a run left in `out` that died in its sixth step."""

    def copied(steps: int) -> None:
        source = kept / str(steps)
        if not source.exists():
            interrupted(train, stop_after, steps, output_dir=source)
        shutil.copytree(source, tmp_path / "out")

    return copied


@pytest.fixture
def whole(train: Train, kept: Path) -> Path:
    """A run that was not interrupted."""
    folder = kept / "whole"
    if not folder.exists():
        assert train(*OPTIONS, output_dir=folder) == 0
    return folder


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "manifest"])
@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_damaged_checkpoint_is_named(
    tmp_path: Path,
    left: Left,
    fails: Fails,
    damage: str,
    file: str,
) -> None:
    left(5)
    folder = tmp_path / "out" / "checkpoint-4"
    path = folder / ("checkpoint.json" if damage == "manifest" else file)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-9] if damage != "flipped" else bytes([whole[0] ^ 1]) + whole[1:])
    reason = {"cut": f"{len(whole) - 9} bytes instead of {len(whole)}", "flipped": "its checksum differs"}
    message = fails(*OPTIONS, "--resume")
    assert f"{path}: damaged checkpoint ({reason.get(damage, '')}" in message
    assert f"remove {folder} to resume from the one before" in message


def test_foreign_pickle_is_not_executed(
    tmp_path: Path,
    left: Left,
    fails: Fails,
) -> None:
    """A state.pt whose checksum is right but that holds code is refused by the weights-only load."""
    left(3)
    folder = tmp_path / "out" / "checkpoint-2"
    forged(folder, {"optimizer": Malicious(tmp_path / "proof")})
    assert "state.pt: damaged checkpoint" in fails(*OPTIONS, "--resume")
    assert not (tmp_path / "proof").exists()


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.path),))


def test_incomplete_folder_is_renamed(tmp_path: Path) -> None:
    said: list[str] = []
    save_checkpoint(tmp_path, 3, {"w": torch.ones(2)}, {"a": 1}, {}, keep=0)
    for _ in range(2):
        (tmp_path / "checkpoint-7").mkdir()
        found = newest_checkpoint(tmp_path, said.append)
    assert found is not None and found.step == 3 and torch.equal(found.weights()["w"], torch.ones(2))
    assert "checkpoint-7 is incomplete (no checkpoint.json) and is now called checkpoint-7.incomplete" in said[0]
    assert said[1].endswith("checkpoint-7.incomplete-2")


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_incomplete_checkpoint_is_not_in_the_way(
    train: Train, tmp_path: Path, left: Left, whole: Path, kind: str
) -> None:
    """Neither of the step where the run will save next, nor of one that --keep-checkpoints counts."""
    left(5)
    for step in (6, 100):
        path = tmp_path / "out" / f"checkpoint-{step}"
        if kind == "folder":
            path.mkdir()
            (path / "model.safetensors").write_bytes(b"half")
        elif kind == "file":
            path.write_text("")
        else:
            path.symlink_to(tmp_path / "none")
    assert train(*OPTIONS, "--resume", "--keep-checkpoints", 2) == 0
    assert_same_weights(tmp_path / "out", whole)
    names = {p.name for p in (tmp_path / "out").glob("*checkpoint*")}
    assert names == {"checkpoint-8", "checkpoint-9", "checkpoint-6.incomplete", "checkpoint-100.incomplete"}


def test_incomplete_checkpoint_that_appears_later(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    save_checkpoint(tmp_path, 3, {"w": torch.ones(2)}, {}, {}, keep=1)
    assert newest_checkpoint(tmp_path, print).step == 3
    assert (tmp_path / "checkpoint-3.incomplete").exists()


def forged(folder: Path, state: Any) -> None:
    """Another state.pt with a checksum that is right."""
    torch.save(state, folder / "state.pt")
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["files"]["state.pt"] = checkpoint_module._describe(folder / "state.pt")
    (folder / "checkpoint.json").write_text(json.dumps(manifest))


STATES: dict[str, Any] = {
    "a list": [1, 2],
    "a number": 7,
    "nothing in it": {},
    "no processes": {"optimizer": {"state": {}, "param_groups": []}},
    "tensor": torch.ones(3),
}


@pytest.mark.parametrize("name", STATES)
def test_state_of_another_structure(tmp_path: Path, left: Left, fails: Fails, name: str) -> None:
    left(3)
    forged(tmp_path / "out" / "checkpoint-2", STATES[name])
    assert "checkpoint-2/state.pt: damaged checkpoint (" in fails(*OPTIONS, "--resume")


PARTS = {
    "optimizer": lambda s: s["optimizer"].update(param_groups=[{}]),
    "scheduler": lambda s: s.update(scheduler=[]),
    "random state": lambda s: s["processes"][0]["rng"].update(torch=torch.ones(3)),
    "window": lambda s: s["processes"][0].update(window={"sums": 3}),
    "processes": lambda s: s.update(processes=[]),
}


@pytest.mark.parametrize("name", PARTS)
def test_part_of_the_state_of_another_structure(tmp_path: Path, left: Left, fails: Fails, name: str) -> None:
    left(3)
    folder = tmp_path / "out" / "checkpoint-2"
    state = torch.load(folder / "state.pt", weights_only=True)
    PARTS[name](state)
    forged(folder, state)
    assert "checkpoint-2/state.pt: damaged checkpoint (" in fails(*OPTIONS, "--resume")


ENTRY = {"bytes": 1, "sha256": "0"}

MANIFESTS: dict[str, Any] = {
    "a list": [1],
    "null": None,
    "files a list": {"files": [1, 2]},
    "files a number": {"files": 3},
    "no files": {"files": {}},
    "other files": {"files": {"../../secret": ENTRY}},
    "entries numbers": {"files": {"model.safetensors": 1, "state.pt": 2}},
    "entries lists": {"files": {"model.safetensors": [], "state.pt": []}},
    "entries empty": {"files": {"model.safetensors": {}, "state.pt": {}}},
    "sizes text": {"files": {n: {"bytes": "x", "sha256": []} for n in ("model.safetensors", "state.pt")}},
    "identity a list": {"identity": []},
    "step text": {"step": "2"},
    "format a list": {"format": [2]},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_of_other_types(tmp_path: Path, left: Left, fails: Fails, name: str) -> None:
    left(3)
    path = tmp_path / "out" / "checkpoint-2" / "checkpoint.json"
    changed = MANIFESTS[name]
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed} if isinstance(changed, dict) else changed))
    message = fails(*OPTIONS, "--resume")
    assert "damaged checkpoint (" in message and "checkpoint-2" in message


@pytest.mark.parametrize("content", [b"\xff", b"[" * 200_000, b"\0\0", b"", b'{"step": ' + b"9" * 5000 + b"}"])
def test_manifest_that_is_no_json(tmp_path: Path, left: Left, fails: Fails, content: bytes) -> None:
    left(3)
    (tmp_path / "out" / "checkpoint-2" / "checkpoint.json").write_bytes(content)
    assert "checkpoint-2/checkpoint.json: damaged checkpoint (" in fails(*OPTIONS, "--resume")


@pytest.mark.parametrize("value", ["many", [3], -1])
def test_identity_of_other_types(tmp_path: Path, left: Left, fails: Fails, value: Any) -> None:
    left(3)
    path = tmp_path / "out" / "checkpoint-2" / "checkpoint.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["max_steps"] = value
    path.write_text(json.dumps(manifest))
    assert f"--max-steps was {value!r} and is now" in fails(*OPTIONS, "--resume")


LINES = {"not UTF-8": b'{"step": 1\xff}\n', "NUL": b"\0\0\0\n", "deep": b"[" * 200_000 + b"\n"}

LINES |= {"long number": b'{"step": ' + b"9" * 5000 + b', "split": "train"}\n', "no step": b"{}\n"}


@pytest.mark.parametrize("name", LINES)
def test_bad_line_of_metrics_is_named(tmp_path: Path, left: Left, fails: Fails, name: str) -> None:
    left(5)
    path = tmp_path / "out" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + LINES[name] + b'{"step": 9, "split": "train"}\n')
    assert re.search(r"metrics\.jsonl:4: not a line of metrics: '.*remove the line", fails(*OPTIONS, "--resume"))


@pytest.mark.parametrize("tail", [b"\0" * 100, b'{"step": 7, "sp', b"\xff\xfe"])
def test_cut_last_line_of_metrics(train: Train, tmp_path: Path, left: Left, whole: Path, tail: bytes) -> None:
    """As a kill or a power failure leaves it: those steps run again."""
    left(5)
    path = tmp_path / "out" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert train(*OPTIONS, "--resume") == 0
    assert without_times(tmp_path / "out") == without_times(whole)
