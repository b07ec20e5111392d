"""Commands around training, one a module: `spo-plot`, `spo-rso`, `spo-extrapolate`, or `python -m`.

Each has `add_arguments(parser)` and `run(arguments)`; `call` makes a command of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from spo_kernels.data.errors import DataError
from spo_kernels.train.errors import TrainError


def call(module: Any, argv: Sequence[str] | None = None) -> int:
    """Run a module as a command; the exit status is 0, or 2 for an error that the user can put right."""
    name = "spo-" + module.__spec__.name.rpartition(".")[2]
    parser = argparse.ArgumentParser(
        prog=name,
        allow_abbrev=False,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        module.run(parser.parse_args(argv))
    except (TrainError, DataError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0
