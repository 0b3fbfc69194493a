"""Which split a text belongs to: decided by a hash of its content, so no text can ever be in two splits.

A teacher may therefore draw fresh training examples for as long as it likes and still never meet a text that labels, is
labelled by, or tests anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

NUM_POOL = {"reasoning": 4000, "code": 5000, "vision": 6000, "audio": 4000}
NUM_LABELLED = 50
NUM_TEST = 500
# Percent of all texts: teachers need variety most, the test set least.
_TEACHER_SHARE = 50
_STUDENT_SHARE = 35


def split_of(text: str) -> str:
    """Returns "teacher", "student" (pool and labelled rows) or "test", from the first 8 bytes of the text's SHA-256."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    if bucket < _TEACHER_SHARE:
        return "teacher"
    return "student" if bucket < _TEACHER_SHARE + _STUDENT_SHARE else "test"


def draw_distinct(
    draw: Callable[[np.random.Generator], tuple[str, str]], split: str, count: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Returns `count` (prompt, completion) pairs of one split, no prompt twice, in the order they were drawn."""
    rows: dict[str, str] = {}
    while len(rows) < count:
        prompt, completion = draw(rng)
        if split_of(prompt) == split:
            rows[prompt] = completion
    return list(rows.items())
