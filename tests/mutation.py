"""Whether the objectives' tests would see a wrong sign, factor, detach or clamp: `make mutation`.

Every mutant changes one place of a file that holds an objective whose formula was looked up at its authors' (FILES). It
is judged by the tests of `tests/losses`, in two rounds. First, in a process forked from one that has imported
everything, the changed function takes the place of the real one and those tests are called that need no fixture, until
one fails. What survives is written into a copy of the package, for pytest and the test of two processes. Exit status 1
below 95 % caught.

Known survivors make no difference: constants of a score or a reward that cancel between the two responses (simpo.py,
divergence.py), the width at which an exponent counts as 0 (divergence.py), the shortcut without smoothing (terms.py), a
length's lower bound of responses that are left out afterwards (nthr.py), and random keys taken off instead of added
(token_weights.py).

    python tests/mutation.py [--processes 2] [--files beta_dpo.py,kto.py] [--list]
"""

import argparse
import ast
import gc
import importlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# what each of them holds: R-DPO and ODPO, β-DPO, α-DPO, Dr. DPO, BDPO BPO and DPOP, DPO-Shift, SPPO and Cal-DPO, KTO,
# AlphaPO, SLiC, χPO, AdaDPO, SGDPO, what they share, NTHR, SamPO and the pilots, AdvPO
FILES = (
    "losses/offsets.py",
    "losses/beta_dpo.py",
    "losses/alpha_dpo.py",
    "losses/dr_dpo.py",
    "losses/asymmetric.py",
    "losses/dpo_shift.py",
    "losses/squares.py",
    "losses/kto.py",
    "losses/simpo.py",
    "losses/hinge.py",
    "losses/divergence.py",
    "losses/reconstructed/balanced.py",
    "losses/sgdpo.py",
    "losses/terms.py",
    "losses/state.py",
    "losses/draws.py",
    "extras/nthr.py",
    "extras/token_weights.py",
    "extras/uncertainty.py",
)
# functions whose arithmetic is budgets, shapes or messages, and LD-DPO's, which is no such row and tested elsewhere
OTHER_WORK = (
    *("__init__", "__post_init__", "_check", "_checked", "load_state_dict"),
    *("nthr_scores", "_residuals", "_tile_shape", "ld_dpo_weights"),
)
TESTS = ("test_by_hand", "test_closed_forms", "test_state")
SLOW_TESTS = ("test_state.py", "-k", "all_processes")
# of test_closed_forms, what compares numbers
LEFT_OUT = ("test_nothing_overflows", "test_float32", "test_stays_on_its_device")
BAR = 0.95
CAUGHT, SURVIVED = 10, 11

_SWAPPED = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*"}
_RENAMED = {
    "clamp_min": "clamp_max",
    "clamp_max": "clamp_min",
    "minimum": "maximum",
    "min": "max",
    "max": "min",
    "amin": "amax",
    "log1p": "log",
    "floor": "ceil",
}
_REMOVED = ("detach", "clamp", "clamp_min", "clamp_max", "square", "sqrt")


@dataclass(frozen=True)
class Mutant:
    """One change: the text from `start` to `stop` of `file` becomes `text`, in the function `name` ("" outside any)."""

    file: str
    name: str
    line: int
    start: int
    stop: int
    text: str
    what: str

    def __str__(self) -> str:
        return f"spo_kernels/{self.file}:{self.line}: {self.what}"

    def source(self) -> str:
        """The file with the change."""
        source = (ROOT / "spo_kernels" / self.file).read_text()
        return source[: self.start] + self.text + source[self.stop :]


class _Finder(ast.NodeVisitor):
    """Collects the mutants of one file."""

    def __init__(self, file: str) -> None:
        self.file, self.found, self.scope = file, list[Mutant](), list[str]()
        self.source = (ROOT / "spo_kernels" / file).read_text()
        lines = self.source.splitlines(keepends=True)
        self.starts = [0]
        for line in lines:
            self.starts.append(self.starts[-1] + len(line))
        self.lines = lines

    def offset(self, line: int, column: int) -> int:
        """Place in the text; the column counts bytes."""
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def span(self, node: ast.expr) -> tuple[int, int]:
        """Where a node's text is."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def code(self, node: ast.expr) -> str:
        """Its text."""
        start, stop = self.span(node)
        return self.source[start:stop]

    def bracketed(self, node: ast.expr) -> str:
        """Its text, in brackets unless it is one word or call."""
        simple = isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript)
        return self.code(node) if simple else f"({self.code(node)})"

    def replace(self, node: ast.expr, text: str) -> None:
        """A mutant that has `text` in place of the node."""
        start, stop = self.span(node)
        what = " ".join(f"{self.source[start:stop]} -> {text}".split())
        self.found.append(Mutant(self.file, ".".join(self.scope), node.lineno, start, stop, text, what))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.within(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name not in OTHER_WORK:
            self.within(node)

    def within(self, node: ast.ClassDef | ast.FunctionDef) -> None:
        """What its body does; decorators and defaults are left alone."""
        self.scope.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self.scope.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Annotations are not arithmetic, and a class's defaults are held by the docs' own test."""

    def visit_Raise(self, node: ast.Raise) -> None:
        """Messages."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Names."""

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        if not isinstance(node.slice, ast.Constant):
            self.visit(node.slice)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        sign = _SWAPPED.get(type(node.op))
        if sign is not None:
            # written anew in brackets: the other sign binds differently
            self.replace(node, f"(({self.code(node.left)}) {sign} ({self.code(node.right)}))")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.replace(node, f"({self.code(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, float):
            self.replace(node, repr(node.value * 2 + (1 if node.value == 0 else 0)))

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr, self.bracketed(node.func.value)
            if name in _RENAMED:
                start, stop = self.span(node.func)
                new = f"{owner}.{_RENAMED[name]}"
                self.found.append(
                    Mutant(self.file, ".".join(self.scope), node.lineno, start, stop, new, f"{owner}.{name} -> {new}")
                )
            if name in _REMOVED and owner != "torch":
                self.replace(node, owner)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1 and isinstance(node.ops[0], ast.Lt | ast.Gt | ast.LtE | ast.GtE):
            sign = "<=" if isinstance(node.ops[0], ast.Gt | ast.GtE) else ">="
            self.replace(node, f"(({self.code(node.left)}) {sign} ({self.code(node.comparators[0])}))")
        self.generic_visit(node)


def mutants(files: tuple[str, ...]) -> list[Mutant]:
    """All of these files', in the order of their lines."""
    found = []
    for file in files:
        finder = _Finder(file)
        finder.visit(ast.parse(finder.source))
        found += sorted(finder.found, key=lambda mutant: (mutant.line, mutant.start, mutant.text))
    return found


def _code(compiled: CodeType, name: str) -> CodeType:
    """The code of the function of that dotted name."""
    for part in name.split("."):
        compiled = next(c for c in compiled.co_consts if isinstance(c, CodeType) and c.co_name == part)
    return compiled


def _apply(mutant: Mutant) -> None:
    """Change the live module: everyone who has imported the function sees it."""
    module = importlib.import_module("spo_kernels." + mutant.file.removesuffix(".py").replace("/", "."))
    compiled = compile(mutant.source(), mutant.file, "exec")
    if not mutant.name:
        changed = ModuleType(module.__name__)
        exec(compiled, changed.__dict__)
        module.__dict__.update({k: v for k, v in vars(changed).items() if isinstance(v, int | float)})
        return
    function: Any = module
    for part in mutant.name.split("."):
        function = vars(function)[part]
    function = getattr(function, "fget", None) or getattr(function, "__func__", function)
    # under a decorator such as torch.no_grad
    getattr(function, "__wrapped__", function).__code__ = _code(compiled, mutant.name)


def _calls(module: ModuleType) -> Iterator[Callable[[], object]]:
    """The module's tests with each of their parameters, but for those that ask for a fixture."""
    for name, test in vars(module).items():
        if not name.startswith("test_") or name in LEFT_OUT:
            continue
        choices: list[list[dict[str, Any]]] = [[{}]]
        for mark in getattr(test, "pytestmark", ()):
            names, values = mark.args[0], mark.args[1]
            keys = [key.strip() for key in names.split(",")] if isinstance(names, str) else list(names)
            choices.append([dict(zip(keys, row if len(keys) > 1 else (row,), strict=True)) for row in values])
        for chosen in itertools.product(*choices):
            given = {key: value for part in chosen for key, value in part.items()}
            if set(given) == set(test.__code__.co_varnames[: test.__code__.co_argcount]):
                yield partial(test, **given)


def _forked(mutant: Mutant | None, calls: list[Callable[[], object]]) -> int:
    """Judge in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    status = SURVIVED
    try:
        if mutant is not None:
            _apply(mutant)
        for call in calls:
            call()
    except BaseException:
        status = CAUGHT
    os._exit(status)


def judge(
    todo: list[Mutant], calls: list[Callable[[], object]], processes: int, limit: float = 60.0
) -> Iterator[tuple[Mutant, bool]]:
    """Each mutant and whether it was caught, as they come; one that runs longer than `limit` seconds is."""
    waiting, running = list(reversed(todo)), dict[int, tuple[Mutant, float]]()
    while waiting or running:
        while waiting and len(running) < processes:
            mutant = waiting.pop()
            running[_forked(mutant, calls)] = mutant, time.monotonic() + limit
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            yield running.pop(pid)[0], not (os.WIFEXITED(status) and os.WEXITSTATUS(status) == SURVIVED)
            continue
        time.sleep(0.01)
        for pid, (_, end) in running.items():
            if time.monotonic() > end:
                os.kill(pid, 9)


def survives_pytest(mutant: Mutant) -> bool:
    """Whether the slow tests pass in a copy of the package that has the change; those that hang do not."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("spo_kernels", "tests"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("csrc", "docs"):
            Path(folder, name).symlink_to(ROOT / name)
        Path(folder, "spo_kernels", mutant.file).write_text(mutant.source())
        file, *options = SLOW_TESTS
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/losses/{file}", *options]
        environment = os.environ | {"PYTHONPATH": folder}
        try:
            return not subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=600).returncode
        except subprocess.TimeoutExpired:
            return False


def main() -> int:
    """Report caught and surviving mutants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="mutants at a time (default 2)")
    parser.add_argument("--files", help="only these, by the ends of their names, with commas")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    arguments = parser.parse_args()
    ends = tuple(arguments.files.split(",")) if arguments.files else ("",)
    todo = mutants(tuple(file for file in FILES if file.endswith(ends)))
    if arguments.list:
        print(*todo, f"{len(todo)} mutants", sep="\n")
        return 0

    started = time.perf_counter()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    # a process that is forked inherits no threads; what is imported at first use is imported once
    torch.set_num_threads(1)
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
    calls = [call for name in TESTS for call in _calls(importlib.import_module(f"tests.losses.{name}"))]
    if os.waitstatus_to_exitcode(os.waitpid(_forked(None, calls), 0)[1]) != SURVIVED:
        print("the tests fail without any change: nothing can be said")
        return 2
    gc.freeze()
    open_ones = []
    for mutant, caught in judge(todo, calls, arguments.processes):
        if not caught:
            open_ones.append(mutant)
            print("not yet:", mutant, flush=True)
    print(f"{len(todo)} mutants, {len(calls)} test calls; {len(open_ones)} go on to pytest", flush=True)
    survivors = [mutant for mutant in open_ones if survives_pytest(mutant)]
    for mutant in survivors:
        print("survived:", mutant)
    caught = len(todo) - len(survivors)
    share = caught / max(len(todo), 1)
    print(f"{len(todo)} mutants, {caught} caught ({share:.1%}), {time.perf_counter() - started:.0f} s")
    return 0 if share >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
