"""Commands as pages print them, put through the parsers that would read them."""

import argparse
import re
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from pages import ROOT

import benchmarks.run
import benchmarks.training.__main__
from spo_kernels.__main__ import build_parser as library_parser
from spo_kernels.commands import extrapolate, plot, rso
from spo_kernels.train.cli import build_parser
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.config_checks import checked

PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "spo_kernels": library_parser,
    "benchmarks.run": benchmarks.run.parser,
    "benchmarks.training": benchmarks.training.__main__.parser,
}


def commands(block: str) -> list[list[str]]:
    """The words of each line; one that ends with a backslash goes on in the next."""
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def spo_train(words: list[str]) -> None:
    options = vars(build_parser().parse_args(words))
    options |= {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    checked(TrainConfig(**options))


def command_of(module: Any) -> Callable[[list[str]], None]:
    def check(words: list[str]) -> None:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        module.add_arguments(parser)
        parser.parse_args(words)

    return check


def pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
    project = (ROOT / "pyproject.toml").read_text()
    for extra in ",".join(extras).split(",") if extras else ():
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets), words


def python(words: list[str]) -> None:
    """A script that is there, or a module that is; the library's own and the benchmarks' options are read."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), words[0]
        return
    assert find_spec(words[1]) is not None, words[1]
    if words[1] in PARSERS:
        PARSERS[words[1]]().parse_args(words[2:])


def script(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file(), words[0]


def launched(words: list[str]) -> None:
    """A launcher's command around spo-train's."""
    spo_train(words[words.index("spo_kernels.train") + 1 :])


def other(words: list[str]) -> None:
    """A program of others."""


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "spo-train": spo_train,
    "spo-plot": command_of(plot),
    "spo-rso": command_of(rso),
    "spo-extrapolate": command_of(extrapolate),
    "pip": pip,
    "make": make,
    "python": python,
    "bash": script,
    "accelerate": launched,
    "torchrun": launched,
    "export": other,
    "tensorboard": other,
    "pre-commit": other,
}
