"""`python -m spo_kernels COMMAND`: what is here, and what the library would do, before it does it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# each a module of spo_kernels.commands with `add_arguments(parser)` and `run(arguments)`, which gives the exit status
COMMANDS = ("doctor", "plan")


def build_parser() -> argparse.ArgumentParser:
    """The options of every command."""
    parser = argparse.ArgumentParser(prog="python -m spo_kernels", allow_abbrev=False, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"spo_kernels.commands.{name}")
        about = module.__doc__ or ""
        command = commands.add_parser(name, allow_abbrev=False, description=about, help=about.splitlines()[0])
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is the command's, 0 if it has none, or 2 for an argument that is wrong."""
    arguments = build_parser().parse_args(argv)
    try:
        status = arguments.run(arguments)
    except ValueError as error:
        arguments.command.error(str(error))
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
