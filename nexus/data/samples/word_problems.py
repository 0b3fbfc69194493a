"""Arithmetic word problems of two steps, with worked answers in GSM8K's form (`#### gold` on the last line).

The numbers stay small (every result below 50) so that a two-layer model can learn them perfectly, while names, things,
structures and wordings combine into more problems than 50 labelled rows can cover.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NAMES = ("Tom", "Ana", "Ben", "Mia", "Leo", "Zoe", "Sam", "Eva")
THINGS = ("apples", "books", "coins", "cards", "pens", "eggs", "shells", "stones")


@dataclass(frozen=True)
class _Structure:
    """Two operations, applied from left to right, and the wordings that ask for them."""

    operations: str
    wordings: tuple[str, ...]


_STRUCTURES = (
    _Structure(
        "+-",
        (
            "{n} has {a} {t}, buys {b} more and gives away {c}. How many {t} are left?",
            "There are {a} {t}. {n} adds {b} and {m} takes {c}. How many {t} are there now?",
        ),
    ),
    _Structure(
        "-+",
        (
            "{n} has {a} {t}, gives away {b} and buys {c} more. How many {t} does {n} have now?",
            "There are {a} {t}. {n} takes {b} and {m} adds {c}. How many {t} are there now?",
        ),
    ),
    _Structure(
        "++",
        (
            "{n} finds {a} {t} on Monday, {b} on Tuesday and {c} on Friday. How many {t} in all?",
            "{n} has {a} {t}, {m} has {b} more than {n} and finds {c}. How many {t} does {m} have now?",
        ),
    ),
    _Structure(
        "--",
        (
            "There are {a} {t}. {n} takes {b} and {m} takes {c}. How many {t} are left?",
            "{n} has {a} {t}, loses {b} and gives {m} {c}. How many {t} does {n} have now?",
        ),
    ),
    _Structure(
        "*+",
        (
            "{n} has {a} boxes of {b} {t} and {c} more. How many {t} in all?",
            "{n} fills {a} bags with {b} {t} each and finds {c} more. How many {t} does {n} have now?",
        ),
    ),
    _Structure(
        "*-",
        (
            "{n} has {a} boxes of {b} {t} and gives away {c}. How many {t} are left?",
            "{n} fills {a} bags with {b} {t} each and loses {c}. How many {t} does {n} have now?",
        ),
    ),
)


def draw_problem(rng: np.random.Generator) -> tuple[str, str]:
    """Returns one (question, answer); the answer holds a line per step and then `#### gold`, a positive integer."""
    while True:
        structure = _STRUCTURES[rng.integers(len(_STRUCTURES))]
        wording = structure.wordings[rng.integers(len(structure.wordings))]
        first, second = tuple(structure.operations)
        low, high = (2, 5) if first == "*" else (6, 20)
        a = int(rng.integers(low, high + 1))
        b = int(rng.integers(2, 6 if first == "*" else 10))
        c = int(rng.integers(2, 10))
        middle = _apply(first, a, b)
        gold = _apply(second, middle, c)
        if middle < 1 or gold < 1:
            continue
        name, other = rng.choice(NAMES, size=2, replace=False)
        question = wording.format(n=name, m=other, t=rng.choice(THINGS), a=a, b=b, c=c)
        return question, f"{a}{first}{b}={middle}\n{middle}{second}{c}={gold}\n#### {gold}"


def gold_of(answer: str) -> str:
    """Returns what follows the last `####` of an answer, stripped; empty when there is none."""
    _, mark, gold = answer.rpartition("####")
    return gold.strip() if mark else ""


def _apply(operation: str, left: int, right: int) -> int:
    if operation == "*":
        return left * right
    return left + right if operation == "+" else left - right
