"""Commands about the library itself, each a module of `spo_kernels.commands`: `python -m spo_kernels doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# a command is a module with `add_arguments` and `run`, which returns the exit status
COMMANDS = ("doctor",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is the command's."""
    parser = argparse.ArgumentParser(prog="python -m spo_kernels", allow_abbrev=False)
    chosen = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: import_module(f"spo_kernels.commands.{name}") for name in COMMANDS}
    for name, module in modules.items():
        about = (module.__doc__ or "").strip()
        command = chosen.add_parser(name, help=about.splitlines()[0], description=about, allow_abbrev=False)
        module.add_arguments(command)
    options = parser.parse_args(argv)
    return modules[options.command].run(options)


if __name__ == "__main__":
    sys.exit(main())
