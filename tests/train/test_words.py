"""Ids put together from words are those of the whole text, or the tokenizer is found out to be of another kind."""

import random
from typing import Any

import datasets
import pytest
from tokenizers import AddedToken

from benchmarks import encoding as benchmark
from spo_kernels.data import words as module
from spo_kernels.data.words import Words

from .conftest import WORDS, build_metaspace, build_tokenizer

PIECES = [*WORDS, "say", "x=12", "2+2", ".", "'s", " ", "  ", "\n", " \n", "\t", "é", "e\u0301", "漢字", "🙂", "\u00a0"]
PIECES += ["<|end|>", "<|user|>\n", "</s>", "\u200b", "▁", "Ġ"]


def groups(n: int, seed: int = 0) -> list[list[str]]:
    rng = random.Random(seed)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 30))) for _ in range(3 * n)]
    return [[a, a + b, a + c] for a, b, c in zip(texts[::3], texts[1::3], texts[2::3], strict=True)]


def whole(tokenizer: Any, texts: list[list[str]]) -> list[list[list[int]]]:
    return [tokenizer(group, add_special_tokens=False)["input_ids"] for group in texts]


def counted(tokenizer: Any, texts: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """Ids, and how often they were put together from words."""
    calls = 0
    original = Words._together

    def together(self: Words, given: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(self, given)

    monkeypatch.setattr(Words, "_together", together)
    words = Words(tokenizer.backend_tokenizer)
    return [ids for group in texts for ids in words.ids([group])], calls


@pytest.mark.parametrize("scheme", ["bytes", "bos", "first", "always"])
def test_words_together_are_the_whole(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer(bos=scheme == "bos") if scheme in ("bytes", "bos") else build_metaspace(scheme)
    monkeypatch.setattr(module, "_KEPT", 500)
    texts = groups(400)
    ids, calls = counted(tokenizer, texts, monkeypatch)
    assert ids == whole(tokenizer, texts) and calls == len(texts)


@pytest.mark.parametrize("kind", ["normaliser", "added token", "single word", "strips"])
def test_other_tokenizers_see_whole_texts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_metaspace("llama-2") if kind == "normaliser" else build_tokenizer()
    if kind != "normaliser":
        content = "say no" if kind == "added token" else "say"
        token = AddedToken(content, single_word=kind == "single word", rstrip=kind == "strips")
        tokenizer.add_tokens([token])
    texts = groups(50)
    ids, calls = counted(tokenizer, texts, monkeypatch)
    assert ids == whole(tokenizer, texts) and calls == 0


def test_the_first_texts_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer whose ids depend on the word before, though no token says so."""
    tokenizer, texts = build_tokenizer(), groups(50)
    original = Words._learn

    def wrong(self: Words, words: set[str]) -> None:
        original(self, words)
        self._known |= {word: [7] for word in words if word == " "}

    monkeypatch.setattr(Words, "_learn", wrong)
    words = Words(tokenizer.backend_tokenizer)
    texts = [["a", "a b"], [" ", " "]]
    assert words.ids(texts) == whole(tokenizer, texts)
    assert not words._apart


@pytest.mark.parametrize("form", ["strings", "messages"])
def test_benchmark(form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)
    monkeypatch.setattr(benchmark, "build_tokenizer", build_tokenizer)
    options = ["--chat", "--limit-seconds", "1e-9"] if form == "messages" else ["--limit-gib", "1"]
    assert benchmark.main(["--pairs", "60", *options]) == (form == "messages")
    assert f"60 pairs of {form}" in capsys.readouterr().out
