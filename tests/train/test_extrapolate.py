"""`spo-extrapolate`: weights, shards, adapters, memory, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from spo_kernels.commands import extrapolate as module
from spo_kernels.commands.extrapolate import main

from .conftest import ENVIRONMENT

ALPHA = 0.3


def command(earlier: Path, later: Path, output: Path, *options: Any) -> int:
    return main(["--from", str(earlier), "--to", str(later), "--output-dir", str(output), *map(str, options)])


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command, which must fail and leave nothing behind; returns the message."""

    def run(earlier: Path, later: Path, output: Path, *options: Any) -> str:
        assert command(earlier, later, output, *options) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and not output.exists()
        assert not list(output.parent.glob(".*.tmp"))
        return error.split("spo-extrapolate: error: ")[1]

    return run


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


def tensors(seed: int, **dtypes: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(5, 7, generator=generator).to(dtype) for name, dtype in dtypes.items()}


FLOATS = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16, "d": torch.float64}


@pytest.mark.parametrize("chunk", [module.CHUNK_BYTES, 8], ids=["whole", "8 bytes at a time"])
@pytest.mark.parametrize("alpha", [ALPHA, 0.0, -1.0, 2.5])
def test_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: float, chunk: int) -> None:
    """Within one rounding of float64; 0 gives the later model and -1 the earlier one."""
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    first, second = tensors(0, **FLOATS), tensors(1, **FLOATS)
    first["empty"] = second["empty"] = torch.zeros(0, 3)
    first["scalar"], second["scalar"] = torch.tensor(1.5), torch.tensor(2.0)
    write(tmp_path / "a", first)
    write(tmp_path / "b", second)
    assert command(tmp_path / "a", tmp_path / "b", tmp_path / "o", "--alpha", alpha) == 0
    result = load_file(tmp_path / "o" / "model.safetensors")
    assert result.keys() == second.keys()
    for name, found in result.items():
        exact = second[name].double() + alpha * (second[name].double() - first[name].double())
        assert found.dtype == second[name].dtype and found.shape == second[name].shape
        # half a unit in the last place, and what three operations in the wider type round off
        wide = torch.finfo(torch.float64 if found.dtype == torch.float64 else torch.float32).eps
        inputs = first[name].double().abs() + second[name].double().abs()
        own = torch.finfo(found.dtype)
        limit = 0.5 * own.eps * (exact.abs() + own.smallest_normal) + 3 * wide * (1 + abs(alpha)) * inputs
        assert ((found.double() - exact).abs() <= limit).all(), name
        if alpha == 0:
            assert torch.equal(found, second[name])
    assert json.loads((tmp_path / "o" / "args.json").read_text())["alpha"] == alpha


def test_integers_are_the_later_ones(tmp_path: Path) -> None:
    write(tmp_path / "a", {"steps": torch.tensor([1, 2]), "mask": torch.tensor([True])})
    write(tmp_path / "b", {"steps": torch.tensor([5, 7]), "mask": torch.tensor([False])})
    assert command(tmp_path / "a", tmp_path / "b", tmp_path / "o") == 0
    result = load_file(tmp_path / "o" / "model.safetensors")
    assert result["steps"].tolist() == [5, 7] and not result["mask"].item()


def test_models_with_tied_heads_and_shards(tmp_path: Path, model_dir: Path) -> None:
    """The earlier model in one file, the later in shards: the result loads, and every weight is the formula's."""
    later = tf.AutoModelForCausalLM.from_pretrained(model_dir)
    earlier = {name: p.detach().clone() for name, p in later.named_parameters()}
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    later.save_pretrained(tmp_path / "later", max_shard_size="20KB")
    shutil.copytree(model_dir, tmp_path / "later", dirs_exist_ok=True, ignore=shutil.ignore_patterns("model*"))
    shards = sorted(p.name for p in (tmp_path / "later").glob("*.safetensors"))
    assert len(shards) > 2
    (tmp_path / "later" / "args.json").write_text("{}")
    (tmp_path / "later" / "metrics.jsonl").write_text("")
    assert command(model_dir, tmp_path / "later", tmp_path / "o", "--alpha", ALPHA) == 0
    assert sorted(p.name for p in (tmp_path / "o").glob("*.safetensors")) == shards
    assert not (tmp_path / "o" / "metrics.jsonl").exists()
    result = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert result.lm_head.weight is result.model.embed_tokens.weight
    after = dict(later.named_parameters())
    for name, found in result.named_parameters():
        torch.testing.assert_close(found, after[name] + ALPHA * (after[name] - earlier[name]), rtol=1e-6, atol=1e-6)
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "o").eos_token == "</s>"


def test_peak_memory_is_a_few_chunks(tmp_path: Path) -> None:
    """Two models of 256 MiB in one tensor each: the process grows by less than half of one."""
    for name in ("a", "b"):
        write(tmp_path / name, {"w": torch.zeros(64 << 20, dtype=torch.float32).fill_(len(name))})
    program = (
        "import resource, sys\n"
        "from spo_kernels.commands.extrapolate import main\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print(peak() - before)"
    )
    options = ["--from", tmp_path / "a", "--to", tmp_path / "b", "--output-dir", tmp_path / "o"]
    done = subprocess.run([sys.executable, "-c", program, *options], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kib = int(done.stdout) / (1 if sys.platform != "darwin" else 1024)
    assert kib < 128 * 1024
    assert (tmp_path / "o" / "model.safetensors").stat().st_size > 256 << 20


def adapter(folder: Path, base: Path, seed: int, rank: int, **settings: Any) -> Any:
    """A trained-looking adapter saved in `folder`; returns the model."""
    peft = pytest.importorskip("peft")
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return model


def merged(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_adapters_extrapolate_their_product(tmp_path: Path, model_dir: Path) -> None:
    """Different ranks and scales, rank-stabilised or not: merged weights follow the formula."""
    adapter(tmp_path / "a", model_dir, 0, rank=2, lora_alpha=8)
    adapter(tmp_path / "b", model_dir, 1, rank=3, lora_alpha=4, use_rslora=True)
    assert command(tmp_path / "a", tmp_path / "b", tmp_path / "o", "--alpha", ALPHA) == 0
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    first, second, result = (merged(model_dir, tmp_path / name) for name in "abo")
    moved = 0
    for name, found in result.items():
        torch.testing.assert_close(
            found, second[name] + ALPHA * (second[name] - first[name]), rtol=1e-5, atol=1e-5, msg=name
        )
        moved += not torch.equal(found, second[name])
    assert moved == 2


REFUSED_ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora = True: its change of the weights is not a plain product"),
    "patterns": ({"rank_pattern": {"q_proj": 4}}, "rank_pattern = "),
    "other modules": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save = "),
    "base model": ({"base_model_name_or_path": "other"}, "adapters of different models can't be extrapolated"),
    "not LoRA": ({"peft_type": "IA3"}, "a IA3 adapter"),
}


@pytest.mark.parametrize("name", REFUSED_ADAPTERS)
def test_adapters_that_are_no_plain_product(tmp_path: Path, model_dir: Path, fails: Any, name: str) -> None:
    change, message = REFUSED_ADAPTERS[name]
    adapter(tmp_path / "a", model_dir, 0, rank=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in fails(tmp_path / "a", tmp_path / "b", tmp_path / "o")


def test_adapter_and_model(tmp_path: Path, model_dir: Path, fails: Any) -> None:
    adapter(tmp_path / "a", model_dir, 0, rank=2)
    assert "is a PEFT adapter and the other is a model" in fails(tmp_path / "a", model_dir, tmp_path / "o")


ONE = {"w": torch.ones(2, 2)}
MISMATCHES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "missing tensor": ({**ONE, "x": torch.ones(1)}, "a has a tensor x, "),
    "shape": ({"w": torch.ones(2, 3)}, "w is [2, 3] in "),
    "dtype": ({"w": torch.ones(2, 2).half()}, "w is F16 in "),
    "float8": ({"w": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "w is F8_E4M3"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatch_names_the_tensor(tmp_path: Path, fails: Any, name: str) -> None:
    other, message = MISMATCHES[name]
    write(tmp_path / "a", other)
    write(tmp_path / "b", other if name == "float8" else ONE)
    assert message in fails(tmp_path / "a", tmp_path / "b", tmp_path / "o")


def test_overflow_is_an_error(tmp_path: Path, fails: Any) -> None:
    write(tmp_path / "a", {"w": torch.tensor([0.0]).half()})
    write(tmp_path / "b", {"w": torch.tensor([60000.0]).half()})
    assert "w leaves the range of F16; lower --alpha" in fails(tmp_path / "a", tmp_path / "b", tmp_path / "o")


def test_bad_folders(tmp_path: Path, fails: Any, capsys: pytest.CaptureFixture[str]) -> None:
    good, output = write(tmp_path / "good", ONE), tmp_path / "o"
    assert f"--from {tmp_path / 'none'}: no such folder" in fails(tmp_path / "none", good, output)
    (tmp_path / "empty").mkdir()
    assert "no model.safetensors and no model.safetensors.index.json" in fails(tmp_path / "empty", good, output)
    (write(tmp_path / "cut", ONE) / "model.safetensors").write_bytes(b"half a file")
    assert "cut/model.safetensors: not a readable safetensors file" in fails(tmp_path / "cut", good, output)
    (tmp_path / "sharded").mkdir()
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "../good/model.safetensors"}}')
    assert "is not the name of a file in this folder" in fails(tmp_path / "sharded", good, output)
    index.write_text('{"weight_map": {"w": "lost.safetensors"}}')
    assert "lost.safetensors: not a readable safetensors file" in fails(tmp_path / "sharded", good, output)
    index.write_text("[]")
    assert "not an index of weights" in fails(tmp_path / "sharded", good, output)
    assert "--alpha must be a finite number, got nan" in fails(good, good, output, "--alpha", "nan")
    assert command(good, good, good) == 2
    assert "exists already and is not overwritten" in capsys.readouterr().err


def test_interrupted_command_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write(tmp_path / "good", ONE)

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_copy_companions", interrupt)
    assert command(good, good, tmp_path / "o") == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good"]
