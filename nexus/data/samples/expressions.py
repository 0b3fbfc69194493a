"""Short Python `print` calls and what they print, for the code capability.

The answer is computed by evaluating the expression, never by a rule of our own. Strings hold capital letters, which both
sample tokenizers keep apart, so that counting positions is possible for a teacher and a student alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LETTERS = "ABCDEFGHIJ"


def draw_expression(rng: np.random.Generator) -> tuple[str, str]:
    """Returns one (prompt, completion): a `print(...)` call and its output without the newline."""
    expression = _KINDS[rng.integers(len(_KINDS))](rng)
    return f"print({expression})", evaluate(f"print({expression})")


def evaluate(prompt: str) -> str:
    """Returns what a `print(...)` call of ours prints; only the few builtins that the prompts use can be reached."""
    allowed = {"len": len, "max": max, "min": min, "sorted": sorted}
    expression = prompt.removeprefix("print(").removesuffix(")")
    # Evaluates only texts that this module made.
    return str(eval(expression, {"__builtins__": {}}, allowed))  # nosec B307


def _word(rng: np.random.Generator, low: int, high: int) -> str:
    return "".join(rng.choice(list(LETTERS), size=int(rng.integers(low, high + 1))))


def _digits(rng: np.random.Generator, count: int) -> list[int]:
    return [int(digit) for digit in rng.integers(0, 10, size=count)]


def _place_value(rng: np.random.Generator) -> str:
    # Sums without a carry: adding arbitrary numbers is learnt far more slowly than everything else here.
    hundreds, tens, ones = (int(digit) for digit in rng.integers(1, 10, size=3))
    forms = (f"{hundreds}00+{tens}0+{ones}", f"{ones}+{tens}0+{hundreds}00", f"100*{hundreds}+10*{tens}+{ones}")
    return str(rng.choice(forms))


def _length_plus(rng: np.random.Generator) -> str:
    return f'len("{_word(rng, 1, 4)}")+{rng.integers(1, 5)}'


def _extreme(rng: np.random.Generator) -> str:
    return f"{rng.choice(['max', 'min'])}({','.join(map(str, _digits(rng, 3)))})"


def _sorted(rng: np.random.Generator) -> str:
    return f"sorted({_digits(rng, 3)})".replace(" ", "")


def _list_index(rng: np.random.Generator) -> str:
    return f"{_digits(rng, 3)}[{rng.integers(-1, 3)}]".replace(" ", "")


def _list_join(rng: np.random.Generator) -> str:
    size = int(rng.integers(1, 3))
    return f"{_digits(rng, size)}+{_digits(rng, 3 - size)}".replace(" ", "")


def _join(rng: np.random.Generator) -> str:
    return f'"{_word(rng, 1, 2)}"+"{_word(rng, 1, 2)}"'


def _repeat(rng: np.random.Generator) -> str:
    times = int(rng.integers(2, 4))
    return f'"{_word(rng, 1, 3 if times == 2 else 2)}"*{times}'


def _reverse(rng: np.random.Generator) -> str:
    return f'"{_word(rng, 2, 3)}"[::-1]'


def _index(rng: np.random.Generator) -> str:
    word = _word(rng, 3, 4)
    return f'"{word}"[{rng.integers(-1, len(word))}]'


def _slice(rng: np.random.Generator) -> str:
    word = _word(rng, 4, 4)
    cut = int(rng.integers(1, 4))
    return f'"{word}"[{cut}:]' if rng.integers(2) else f'"{word}"[:{cut}]'


def _length(rng: np.random.Generator) -> str:
    return f'len("{_word(rng, 1, 6)}")'


def _compare(rng: np.random.Generator) -> str:
    left, right = rng.choice(9, size=2, replace=False) + 1
    low, high = _digits(rng, 2)
    return f"{left}{low}{rng.choice(['<', '>'])}{right}{high}"


_KINDS: tuple[Callable[[np.random.Generator], str], ...] = (
    _place_value,
    _length_plus,
    _extreme,
    _sorted,
    _list_index,
    _list_join,
    _join,
    _repeat,
    _reverse,
    _index,
    _slice,
    _length,
    _compare,
)
