"""The task: adding and subtracting two-digit numbers column by column, with the working written out.

A problem reads ``What is 53-27?`` and its right solution::

    ones 13-7=6 borrow
    tens 4-2=2
    A: 26

A wrong solution makes one of the slips that people make, in one column, and carries on from it:

- *forgotten carry*: a carry (or borrow) was noted, and the next column leaves it out;
- *turned around*: a subtraction column takes the smaller digit from the larger, so that nothing is borrowed;
- *one too many*, *one too few*: a column is miscounted.

The answer on the ``A:`` line is what gets checked, not the working.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

COLUMNS = ("ones", "tens")
SLIPS = ("forgotten carry", "turned around", "one too many", "one too few")
MISCOUNT = {"one too many": 1, "one too few": -1}
PROBLEMS = 90 * 90 + 90 * 91 // 2  # sums, and differences that are not negative
ANSWER = re.compile(r"^A: (\d+)$", re.MULTILINE)

Record = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """``a + b``, or ``a - b`` with ``a >= b``; both numbers have two digits."""

    a: int
    b: int
    op: str

    @property
    def prompt(self) -> str:
        return f"What is {self.a}{self.op}{self.b}?\n"

    @property
    def answer(self) -> int:
        return self.a + self.b if self.op == "+" else self.a - self.b


@dataclass(frozen=True)
class Slip:
    """One mistake: its kind and its column (0 = ones)."""

    kind: str
    column: int


def problems(rng: random.Random) -> Iterator[Problem]:
    """All problems in random order, no two the same: what is taken first is held out from what is taken later."""
    seen: set[Problem] = set()
    while len(seen) < PROBLEMS:
        a, b, op = rng.randint(10, 99), rng.randint(10, 99), rng.choice("+-")
        problem = Problem(max(a, b), min(a, b), op) if op == "-" else Problem(a, b, op)
        if problem not in seen:
            seen.add(problem)
            yield problem


def solve(problem: Problem, slip: Slip | None = None) -> str:
    """The written solution. A slip that can't happen in this problem (no carry to forget) changes nothing."""
    work_column = _add_column if problem.op == "+" else _subtract_column
    lines, answer, carry = [], 0, 0
    for column, name in enumerate(COLUMNS):
        kind = slip.kind if slip is not None and slip.column == column else None
        carry = 0 if kind == "forgotten carry" else carry
        working, digit, carry = work_column(_digit(problem.a, column), _digit(problem.b, column), carry, kind)
        lines.append(f"{name} {working}")
        answer += digit * 10**column
    if problem.op == "+":
        answer += carry * 10 ** len(COLUMNS)
    return "\n".join([*lines, f"A: {answer}"])


def _digit(number: int, column: int) -> int:
    return number // 10**column % 10


def _add_column(x: int, y: int, carry: int, kind: str | None) -> tuple[str, int, int]:
    """The column as written, its digit, and the carry into the next."""
    total = _miscount(x + y + carry, kind, most=19)
    terms = f"{x}+{y}+1" if carry else f"{x}+{y}"
    carry = int(total >= 10)
    return f"{terms}={total}{' carry' * carry}", total % 10, carry


def _subtract_column(x: int, y: int, borrowed: int, kind: str | None) -> tuple[str, int, int]:
    top = x - borrowed  # -1 where a zero was borrowed from: 9 once it has borrowed in turn
    if kind == "turned around" and 0 <= top < y:
        top, y = y, top
    borrow = int(top < y)
    top += 10 * borrow
    digit = _miscount(top - y, kind, most=9)
    return f"{top}-{y}={digit}{' borrow' * borrow}", digit, borrow


def _miscount(right: int, kind: str | None, most: int) -> int:
    """The column's result, or its neighbour where the slip says so and it stays within 0 and ``most``."""
    wrong = right + MISCOUNT.get(kind or "", 0)
    return wrong if 0 <= wrong <= most else right


def possible_slips(problem: Problem) -> list[Slip]:
    """The slips that make a difference in this problem."""
    right = solve(problem)
    slips = (Slip(kind, column) for kind in SLIPS for column in range(len(COLUMNS)))
    return [slip for slip in slips if solve(problem, slip) != right]


def solve_badly(problem: Problem, rng: random.Random) -> str:
    """A solution with one slip: its kind is drawn first, then its column, each evenly among the possible."""
    slips = possible_slips(problem)
    kind = rng.choice([kind for kind in SLIPS if any(slip.kind == kind for slip in slips)])
    return solve(problem, rng.choice([slip for slip in slips if slip.kind == kind]))


def read_answer(text: str) -> int | None:
    """The number on the first answer line, or None where there is none."""
    match = ANSWER.search(text)
    return int(match.group(1)) if match else None


def is_right(problem: Problem, text: str) -> bool:
    return read_answer(text) == problem.answer


def sft_record(problem: Problem, sloppiness: float, rng: random.Random) -> Record:
    """A demonstration, wrong with probability ``sloppiness``."""
    sloppy = rng.random() < sloppiness
    return {"prompt": problem.prompt, "completion": solve_badly(problem, rng) if sloppy else solve(problem)}


def preference_record(problem: Problem, rng: random.Random) -> Record:
    """The right solution (chosen) beside one with a slip (rejected)."""
    return {"prompt": problem.prompt, "chosen": solve(problem), "rejected": solve_badly(problem, rng)}
