"""The command line: TrainConfig's fields as options, and errors as one line with exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from types import UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from spo_kernels.data.errors import DataError
from spo_kernels.train.config import TrainConfig, as_flags
from spo_kernels.train.config_checks import checked
from spo_kernels.train.errors import TrainError
from spo_kernels.train.signals import Stopped, StopSignals

PROGRAM = "spo-train"
# What other trainers call our options.
ELSEWHERE = {
    "--lr": "--learning-rate",
    "--loss-type": "--loss",
    "--model-name-or-path": "--model",
    "--model-id": "--model",
    "--dataset-name": "--dataset",
    "--train-file": "--dataset",
    "--output": "--output-dir",
    "--per-device-train-batch-size": "--batch-size",
    "--micro-batch-size": "--batch-size",
    "--gradient-accumulation-steps": "--grad-accum",
    "--num-train-epochs": "--epochs",
    "--max-seq-length": "--max-length",
    "--lr-scheduler-type": "--schedule",
    "--torch-dtype": "--dtype",
    "--use-peft": "--lora-r",
    "--lora-target-modules": "--lora-targets",
    "--resume-from-checkpoint": "--resume",
    "--save-total-limit": "--keep-checkpoints",
    "--use-flash-attention": "--attn-implementation",
}
# Commands that stood here before they had names of their own.
MOVED = ("plot", "rso", "extrapolate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 2 for an error that the user can put right, or 128 + a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with StopSignals() as stop:
            options: dict[str, Any] = vars(build_parser().parse_args(arguments))
            options |= {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
            config = checked(TrainConfig(**options))
            _runner()(config, stop)
    # What is said is empty in all processes but one.
    except (TrainError, DataError) as error:
        return _left(2, f"error: {error}" if str(error) else "")
    except Stopped as stopped:
        return _left(stopped.exit_code, str(stopped))
    return 0


def _left(status: int, message: str) -> int:
    if message:
        print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


def _runner() -> Callable[[TrainConfig, StopSignals], None]:
    """Import what trains: it takes seconds, so only once the options are known to be good."""
    try:
        from spo_kernels.train.run import run
    except ModuleNotFoundError as error:
        raise TrainError(
            f"{error}; training needs more packages: pip install transformers datasets accelerate peft"
        ) from error
    return run


class _Parser(argparse.ArgumentParser):
    """Names the option that was perhaps meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """First the unknown options: a misspelt required one is not also missing."""
        args = sys.argv[1:] if args is None else args
        known = self._option_string_actions
        flags = [a.partition("=")[0] for a in args if a.startswith("--") and a != "--"]
        unknown = [_meant(flag, list(known)) for flag in flags if flag not in known]
        if unknown:
            self.error(f"unrecognized arguments: {', '.join(unknown)}")
        if args and args[0] in MOVED:
            self.error(f"spo-train {args[0]} is now the command spo-{args[0]}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (--help lists all options)\n")


def _meant(flag: str, known: list[str]) -> str:
    dashed = flag.replace("_", "-").lower()
    close = [ELSEWHERE[dashed]] if dashed in ELSEWHERE else get_close_matches(dashed, known, n=1, cutoff=0.75)
    return f"{flag} (did you mean {close[0]}?)" if close else flag


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="Fine-tune a causal language model on examples (sft) or preference pairs, "
        "without ever materialising its logits.",
        epilog="Other commands, each with its own --help: spo-plot, spo-rso, spo-extrapolate.",
    )
    hints = get_type_hints(TrainConfig)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in fields(TrainConfig):
        name = f.metadata["group"]
        group = groups.setdefault(name, parser.add_argument_group(name))
        _add_option(group, f, hints[f.name])
    return parser


def _add_option(group: argparse._ArgumentGroup, f: Field[Any], hint: Any) -> None:
    flag = as_flags([f.name])
    text = f.metadata["help"].replace("%", "%%")
    if hint is bool:
        group.add_argument(flag, action="store_true", help=f"{text} (default: off)")
        return
    if get_origin(hint) is tuple:
        group.add_argument(flag, action="append", default=[], metavar="KEY=VALUE", help=text)
        return
    required = f.default is MISSING
    if not required and f.default is not None and "(default" not in text:
        text += f" (default: {f.default})"
    group.add_argument(
        flag,
        type=_scalar(hint),
        required=required,
        default=None if required else f.default,
        choices=f.metadata["choices"] or None,
        metavar=None if f.metadata["choices"] else _scalar(hint).__name__.upper(),
        help=text,
    )


def _scalar(hint: Any) -> type:
    """The type in `T` or `T | None`."""
    if isinstance(hint, UnionType):
        return next(t for t in get_args(hint) if t is not type(None))
    return hint
