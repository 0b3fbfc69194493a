"""Short Python `print` calls and what they print, for the code capability.

The answer is computed by evaluating the expression, never by a rule of our own. Strings hold capital letters, which both
sample tokenizers keep apart, so that counting positions is possible for a teacher and a student alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LETTERS = "ABCDEFGHIJKL"


def draw_expression(rng: np.random.Generator) -> tuple[str, str]:
    """Returns one (prompt, completion): a `print(...)` call and its output without the newline."""
    expression = _KINDS[rng.integers(len(_KINDS))](rng)
    return f"print({expression})", evaluate(f"print({expression})")


def evaluate(prompt: str) -> str:
    """Returns what a `print(...)` call of ours prints; only the few builtins that the prompts use can be reached."""
    allowed = {"len": len, "max": max, "min": min, "sum": sum, "sorted": sorted}
    expression = prompt.removeprefix("print(").removesuffix(")")
    return str(eval(expression, {"__builtins__": {}}, allowed))  # nosec B307 - only texts made by this module


def _word(rng: np.random.Generator, low: int, high: int) -> str:
    return "".join(rng.choice(list(LETTERS), size=int(rng.integers(low, high + 1))))


def _digits(rng: np.random.Generator, count: int) -> list[int]:
    return [int(digit) for digit in rng.integers(0, 10, size=count)]


def _arithmetic(rng: np.random.Generator) -> str:
    a, b, c = int(rng.integers(9, 20)), *_digits(rng, 2)
    first, second = rng.choice(["+", "-"], size=2)
    expression = f"{a}{first}{b}{second}{c}"
    return expression if first == "+" or second == "+" or a >= b + c else f"{a}+{b}-{c}"


def _sum(rng: np.random.Generator) -> str:
    return f"sum({_digits(rng, 3)})".replace(" ", "")


def _extreme(rng: np.random.Generator) -> str:
    return f"{rng.choice(['max', 'min'])}({','.join(map(str, _digits(rng, 3)))})"


def _sorted(rng: np.random.Generator) -> str:
    return f"sorted({_digits(rng, 3)})".replace(" ", "")


def _list_index(rng: np.random.Generator) -> str:
    size = int(rng.integers(3, 5))
    return f"{_digits(rng, size)}[{rng.integers(-1, size)}]".replace(" ", "")


def _join(rng: np.random.Generator) -> str:
    return f'"{_word(rng, 1, 3)}"+"{_word(rng, 1, 3)}"'


def _repeat(rng: np.random.Generator) -> str:
    times = int(rng.integers(2, 4))
    return f'"{_word(rng, 1, 3 if times == 2 else 2)}"*{times}'


def _reverse(rng: np.random.Generator) -> str:
    return f'"{_word(rng, 2, 4)}"[::-1]'


def _index(rng: np.random.Generator) -> str:
    word = _word(rng, 3, 5)
    return f'"{word}"[{rng.integers(-1, len(word))}]'


def _slice(rng: np.random.Generator) -> str:
    word = _word(rng, 4, 5)
    cut = int(rng.integers(1, 4))
    return f'"{word}"[{cut}:]' if rng.integers(2) else f'"{word}"[:{cut}]'


def _length(rng: np.random.Generator) -> str:
    return f'len("{_word(rng, 2, 7)}")'


def _contains(rng: np.random.Generator) -> str:
    word = _word(rng, 3, 4)
    letter = rng.choice(list(word)) if rng.integers(2) else _word(rng, 1, 1)
    return f'"{letter}" in "{word}"'


def _compare(rng: np.random.Generator) -> str:
    left, right = (int(value) for value in rng.integers(10, 100, size=2))
    return f"{left}{rng.choice(['<', '>'])}{right}"


_KINDS: tuple[Callable[[np.random.Generator], str], ...] = (
    _arithmetic,
    _sum,
    _extreme,
    _sorted,
    _list_index,
    _join,
    _repeat,
    _reverse,
    _index,
    _slice,
    _length,
    _contains,
    _compare,
)
