"""Tiny models, tokenizers and data on disk; nothing here touches the network."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from one_thread import one_thread  # noqa: F401 (a fixture of every test here)

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import datasets
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

import spo_kernels
from spo_kernels.train.cli import main

datasets.disable_progress_bars()
# For processes that tests start: this checkout, one thread.
ROOT = str(Path(spo_kernels.__file__).parents[1])
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, str(Path(ROOT) / "tests"), os.environ.get("PYTHONPATH")])),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["red", "blue", "green", "one", "two", "three", "cat", "dog", "bird", "fish"]


def pair(i: int) -> dict[str, str]:
    """Chosen repeats the prompt's word, rejected says another one; lengths differ from pair to pair."""
    word, other = WORDS[i % 10], WORDS[(3 * i + 1) % 10]
    return {
        "prompt": f"say {word} {WORDS[(i // 10) % 10]}\n",
        "chosen": " ".join([word] * (1 + i % 3)),
        "rejected": " ".join([other] * (1 + i % 4)) + " no",
    }


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build_tokenizer(bos: bool = False, chat: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{w} {w}\n" for w in WORDS] + ["say no"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
    )
    if bos:
        from tokenizers.processors import TemplateProcessing

        fast.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def build_metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """As SentencePiece: a space in front of a text ("first", "always"), or as Llama 2's normaliser does it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if scheme == "llama-2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["Paris", *WORDS, "say no x = 12"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def scored_ids(example: Any, k: int) -> list[int]:
    """Ids of response k that count."""
    return [int(i) for start, end in example.spans(k) for i in example.responses[k][start:end]]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama with a tied head, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", [pair(i) for i in range(48)])


@pytest.fixture(scope="session")
def sft_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in map(pair, range(48))]
    return write_jsonl(tmp_path_factory.mktemp("data") / "sft.jsonl", rows)


def reset_accelerator() -> None:
    """accelerate keeps one state per process; a run in another precision needs a new one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    reset_accelerator()


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


@pytest.fixture
def shared_references(monkeypatch: pytest.MonkeyPatch, reference_folder: Path) -> None:
    """One cache of the reference's log-probs for all runs, which otherwise spend a third of their time on it."""
    monkeypatch.setattr("spo_kernels.train.reference.CACHE_FOLDER", str(reference_folder))


Train = Callable[..., int]
Fails = Callable[..., str]
Whole = Callable[..., Path]


def read_metrics(output: Path, split: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if split in (None, line["split"])]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    """Bit for bit."""
    first, second = read_weights(a), read_weights(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_close_weights(a: Path, b: Path, atol: float) -> None:
    second = read_weights(b)
    for name, tensor in read_weights(a).items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def train(model_dir: Path, pairs_file: Path, tmp_path: Path) -> Train:
    """Runs the command line in this process: train("--beta", 0.2, output_dir=..., model=...)."""

    def run(*extra: Any, model: Any = None, dataset: Any = None, output_dir: Any = None) -> int:
        reset_accelerator()
        return main(
            [
                "--quiet",
                "--model",
                str(model or model_dir),
                "--dataset",
                str(dataset or pairs_file),
                "--output-dir",
                str(output_dir or tmp_path / "out"),
                *map(str, extra),
            ]
        )

    return run


@pytest.fixture(scope="session")
def whole_runs() -> dict[tuple[str, ...], Path]:
    return {}


@pytest.fixture
def whole(train: Train, whole_runs: dict[tuple[str, ...], Path], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """whole("--beta", 0.2): the folder of a run that nothing disturbs, made once for all tests; they only read it."""

    def run(*options: Any, **inputs: Any) -> Path:
        key = (*map(str, options), *(f"{name}={value}" for name, value in inputs.items()))
        if key not in whole_runs:
            folder = tmp_path_factory.mktemp("whole")
            assert train(*options, output_dir=folder, **inputs) == 0
            whole_runs[key] = folder
        return whole_runs[key]

    return run


@pytest.fixture
def fails(train: Train, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs the command line, which must fail as a user's error; returns the message."""

    def run(*options: Any, **overrides: Any) -> str:
        try:
            status = train("--max-steps", 1, *options, **overrides)
        except SystemExit as exit:
            status = exit.code
        error = capsys.readouterr().err
        assert status == 2
        assert "Traceback" not in error
        return error.split("spo-train: error: ")[1]

    return run
