"""Answers as texts that can be compared: what counts as the answer, and which spellings are one number."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nexus.data.answers import extract_answer, gold_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He has 5 apples.\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("####$1,200.50", "1200.5"),
        ("#### 18.00\nNext question: 3 #### 4", "18"),
        ("#### 18.", "18"),
        ("#### 1000", "1000"),
        ("#### -7", "-7"),
        ("#### -0.0", "0"),
        ("#### 0.10", "0.1"),
        ("#### 1e3", "1000"),
        ("####   Paris ", "Paris"),
        ("#### nan", "nan"),
        ("####", None),
        ("####\n18", None),
        ("the answer is 18", None),
        ("", None),
    ],
)
def test_gsm8k_answers_are_what_follows_the_marks_as_a_number(text, expected):
    assert extract_answer(text, "gsm8k") == expected


@pytest.mark.parametrize(
    ("text", "expected"), [(" [1, 2]\n", "[1, 2]"), ("18.0", "18.0"), ("#### 1", "#### 1"), (" \n", None)]
)
def test_exact_answers_are_the_stripped_text(text, expected):
    assert extract_answer(text, "exact") == expected


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [
        ("He has 5.\n#### 1,018", "gsm8k", "1018"),
        (" 1,018.0 ", "gsm8k", "1018"),
        ("Paris", "gsm8k", "Paris"),
        (" ", "gsm8k", None),
        (" 1,018.0 ", "exact", "1,018.0"),
    ],
)
def test_a_bare_number_is_as_good_a_gold_answer_as_one_behind_the_marks(text, pattern, expected):
    assert gold_answer(text, pattern) == expected


def test_scoring_answers_loads_no_tensor_library():
    code = (
        "import sys; from nexus.assembly.evaluate import score_answers; "
        "print(score_answers(['#### 2.0'], ['2'], 'gsm8k')[0], {'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.strip() == "True set()"
