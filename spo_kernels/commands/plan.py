"""What `fused_spo_loss` with a trained head will take: its path, its products and its bytes.

Computed by the functions that plan a call, from shapes alone: neither the memory nor the GPU need be here.
"""

from __future__ import annotations

import argparse

import torch

from spo_kernels.losses.registry import build_loss
from spo_kernels.preference.forecast import Forecast, Head, forecast

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GIB = 1 << 30
# of tokens, and of any size: the bytes of two together fit 64 bits
_MOST = 1 << 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = parser.add_mutually_exclusive_group(required=True)
    lengths.add_argument("--tokens", type=_positive, help="of each of the two responses of a pair, prompts not counted")
    lengths.add_argument("--lengths", type=_lengths, help="of all responses, such as 500,80,310,95: chosen ones first")
    parser.add_argument("--pairs", type=_positive, default=1, help="with --tokens (default: 1)")
    parser.add_argument("--vocab", type=_positive, required=True, help="V, rows of the head's weight")
    parser.add_argument("--hidden", type=_positive, required=True, help="H, entries of a hidden state")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: bfloat16)")
    parser.add_argument("--loss", default="spo", help="an objective's name (default: spo)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here, help=f"(default: {here})")
    parser.add_argument("--memory-gib", type=float, help="of a GPU that is not here")
    parser.add_argument(
        "--accumulate", action="store_true", help="LMHead(accumulate=True), in a call that adds to its weight.grad"
    )
    parser.add_argument("--workspace-mib", type=_positive, help="workspace_bytes of the call (default: the library's)")


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    print(describe(arguments))


def describe(arguments: argparse.Namespace) -> str:
    """The plan in words.

    Raises:
        ValueError: An argument is wrong.
    """
    on_gpu, memory = arguments.device == "cuda", arguments.memory_gib
    if memory is not None and not (on_gpu and memory > 0):
        raise ValueError(f"--memory-gib is a GPU's, above 0, got {memory:g} for --device {arguments.device}")
    if on_gpu and memory is None and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: say how much memory yours has, with --memory-gib")
    tokens = sum(arguments.lengths) if arguments.lengths else 2 * arguments.pairs * arguments.tokens
    if tokens > _MOST:
        raise ValueError(f"a call of at most {_MOST} tokens can be planned, got {tokens}")
    lengths = arguments.lengths or [arguments.tokens] * (2 * arguments.pairs)
    head = Head(
        arguments.vocab,
        arguments.hidden,
        DTYPES[arguments.dtype],
        torch.device(arguments.device),
        None if memory is None else int(memory * GIB),
    )
    mib = arguments.workspace_mib
    found = forecast(
        build_loss(arguments.loss),
        lengths,
        head,
        None if mib is None else mib << 20,
        adds_to_grad=arguments.accumulate,
    )
    call = f"loss: {arguments.loss} with a trained head, {arguments.dtype}, {arguments.device}"
    return "\n".join([call, *_lines(found, lengths, head)])


def _lines(found: Forecast, lengths: list[int], head: Head) -> list[str]:
    plan, shape, tokens = found.plan, found.plan.shape, sum(lengths)
    size = f"[{tokens}, {head.hidden_size}] x [{head.hidden_size}, {head.vocab}]"
    lines = [
        f"responses: {len(lengths)}, of {tokens} tokens together",
        f"products: {plan.products} of {size}",
        f"path: {plan.path}" + (f", since {found.why}" if found.why else ""),
    ]
    if shape is not None:
        tiles = f"{len(plan.groups)} of {shape.rows} tokens at most" if plan.groups else f"of {shape.rows} tokens"
        lines.append(f"tiles: {tiles}, {shape.columns} columns of the vocabulary in work")
    # in two passes the backward is left hidden's gradient, which the budget does not count
    left = "" if shape is not None else f" and the [{tokens}, {head.hidden_size}] left to the backward, at most"
    lines.append(f"workspace{left}: {_size(found.workspace)}")
    lines.append(f"workspace that three products may take: {_size(found.allowed)}")
    return [*lines, f"hidden states, weight and their gradients: {_size(found.given)}"]


def _size(count: int) -> str:
    return f"{count} bytes ({count / (1 << 20):.1f} MiB)"


def _positive(text: str) -> int:
    value = int(text)
    if not 1 <= value <= _MOST:
        raise argparse.ArgumentTypeError(f"must be between 1 and {_MOST}, got {value}")
    return value


def _lengths(text: str) -> list[int]:
    values = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if len(values) % 2 or min(values) < 0:
        raise argparse.ArgumentTypeError(f"must be an even number of lengths such as 500,80, got {text!r}")
    return values
