"""The command line: TrainConfig's fields as options, other commands by their name, and errors as one line with exit
status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from importlib import import_module
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from spo_kernels.data.errors import DataError
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.errors import TrainError

PROGRAM = "spo-train"


# Modules of commands other than training: each has add_arguments(parser) and run(arguments).
COMMANDS = {
    "extrapolate": "go on from one round's weights in the direction of the next one's (APO, arXiv 2410.06293)",
    "rso": "preference pairs from scored candidates by rejection sampling (RSO, arXiv 2309.06657)",
    "plot": "draw metrics.jsonl",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for an error that the user can put right."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else None
    try:
        if command is None:
            _train(arguments)
        else:
            _run_command(command, arguments)
    except (TrainError, DataError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "; --resume goes on from the newest checkpoint" if command is None else ""
        print(f"{PROGRAM}: interrupted{goes_on}", file=sys.stderr)
        return 130
    return 0


def _train(arguments: list[str]) -> None:
    options: dict[str, Any] = vars(build_parser().parse_args(arguments))
    options |= {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    config = TrainConfig(**options).check()
    _runner()(config)


def _run_command(command: str, arguments: list[str]) -> None:
    try:
        module = import_module(f"spo_kernels.train.{command}")
    except ModuleNotFoundError as error:
        raise TrainError(f"{error}; {PROGRAM} needs more packages: pip install 'spo_kernels[train]'") from error
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {command}",
        allow_abbrev=False,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    module.run(parser.parse_args(arguments))


def _runner() -> Callable[[TrainConfig], None]:
    """Import what trains: it takes seconds, so only once the options are known to be good."""
    try:
        from spo_kernels.train.run import run
    except ModuleNotFoundError as error:
        raise TrainError(f"{error}; training needs more packages: pip install 'spo_kernels[train]'") from error
    return run


class _Formatter(argparse.HelpFormatter):
    """Wraps texts but the list of commands."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="Fine-tune a causal language model on examples (sft) or preference pairs, "
        "without ever materialising its logits.",
        epilog="other commands, each with its own --help:\n"
        + "".join(f"  {PROGRAM} {name:13}{text}\n" for name, text in COMMANDS.items()),
        formatter_class=_Formatter,
    )
    hints = get_type_hints(TrainConfig)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in fields(TrainConfig):
        name = f.metadata["group"]
        group = groups.setdefault(name, parser.add_argument_group(name))
        _add_option(group, f, hints[f.name])
    return parser


def _add_option(group: argparse._ArgumentGroup, f: Field[Any], hint: Any) -> None:
    flag = "--" + f.name.replace("_", "-")
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
