"""The answer that a text gives, normalised so that equal answers are equal strings. Needs no tensor library."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Literal

AnswerPattern = Literal["gsm8k", "exact"]

# GSM8K writes "... #### 1,234"; whatever a model goes on to say is on later lines.
_FINAL_ANSWER = re.compile(r"####[ \t]*([^\n]*)")


def extract_answer(text: str, pattern: AnswerPattern) -> str | None:
    """Return the answer that `text` gives.

    Args:
        text: a completion, or a gold answer.
        pattern: "exact" takes all of the stripped text; "gsm8k" the rest of the line after the first `####`, numbers without
            currency signs, thousands separators, a closing full stop or trailing zeros.

    Returns:
        None when there is no (non-empty) answer.
    """
    if pattern == "exact":
        return text.strip() or None
    match = _FINAL_ANSWER.search(text)
    return None if match is None else _normalised_number(match.group(1)) or None


def gold_answer(answer: str, pattern: AnswerPattern) -> str | None:
    """Return what `extract_answer` has to find; under "gsm8k" a bare number is as good as one behind `####`."""
    if pattern == "gsm8k" and "####" not in answer:
        return _normalised_number(answer) or None
    return extract_answer(answer, pattern)


def _normalised_number(text: str) -> str:
    """Return a canonical spelling of a number; other text only stripped."""
    stripped = text.strip()
    digits = stripped.replace(",", "").replace("$", "").rstrip(".").strip()
    try:
        number = Decimal(digits)
    except InvalidOperation:
        return stripped
    if not number.is_finite():
        return stripped
    # "f" without normalising first would keep 18.00; normalising alone would write 1E+3 and -0.
    return format(number.normalize() + 0, "f")
