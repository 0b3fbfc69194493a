"""Errors of single rows, batches of like length, and equality of targets."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.errors import DataError
from nexus.towers.rows import RowsError, micro_batches
from nexus.towers.targets import TeacherTargets, TokenTargets


def test_an_error_of_rows_names_them_and_crosses_processes() -> None:
    error = RowsError("Expected sound rows; mend them.", {"a": "no image", "b": "not finite"})
    assert isinstance(error, DataError)
    assert str(error) == "Expected sound rows; mend them. Found 2 bad rows: a: no image; b: not finite."
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.reasons, copy.what) == (RowsError, str(error), error.reasons, error.what)


def test_an_error_of_many_rows_stays_one_line() -> None:
    error = RowsError("Expected sound rows.", {f"row-{i}": "bad" for i in range(1000)})
    assert str(error).endswith("row-4: bad and 995 more.")
    assert len(error.reasons) == 1000


@given(lengths=st.lists(st.integers(0, 50), max_size=40), max_rows=st.integers(1, 8), max_positions=st.integers(1, 100))
def test_every_row_is_in_one_batch_within_both_limits(lengths: list[int], max_rows: int, max_positions: int) -> None:
    batches = list(micro_batches(lengths, max_rows=max_rows, max_positions=max_positions))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[row] for row in batch)
        assert len(batch) == 1 or (len(batch) <= max_rows and padded <= max_positions)
    order = [lengths[row] for batch in batches for row in batch]
    assert order == sorted(order, reverse=True)


def targets() -> TeacherTargets:
    tokens = TokenTargets(
        offsets_B1=np.array([0, 1]),
        token_ids_N=np.array([3], dtype=np.int32),
        ids_NK=np.array([[3, 4]], dtype=np.int32),
        logprobs_NK=np.array([[-0.1, -3.0]], dtype=np.float32),
        tail_logprob_N=np.array([-np.inf], dtype=np.float32),
    )
    return TeacherTargets(
        teacher="t",
        fingerprint="f",
        tokenizer_hash="h",
        row_ids=("a",),
        tokens=tokens,
        hidden={1: np.ones((1, 4), dtype=np.float16)},
        pooled_BE=np.array([[1.0, np.nan]], dtype=np.float32),
        label_texts=None,
        label_logprobs_BC=None,
    )


def test_equal_targets_are_equal_also_after_crossing() -> None:
    assert targets() == targets()
    assert pickle.loads(pickle.dumps(targets())) == targets()


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": "u"},
        {"row_ids": ("b",)},
        {"tokens": None},
        {"tokens": replace(targets().tokens, tail_logprob_N=np.array([-1.0], dtype=np.float32))},  # type: ignore[type-var]
        {"hidden": {}},
        {"hidden": {2: np.ones((1, 4), dtype=np.float16)}},
        {"hidden": {1: np.zeros((1, 4), dtype=np.float16)}},
        {"pooled_BE": np.array([[1.0, np.nan]], dtype=np.float64)},
        {"label_texts": ("x",)},
    ],
)
def test_any_difference_makes_targets_unequal(changes: dict[str, object]) -> None:
    assert replace(targets(), **changes) != targets()  # type: ignore[arg-type]


def test_targets_are_no_key_and_equal_to_nothing_else() -> None:
    assert targets() != "targets"
    with pytest.raises(TypeError, match="unhashable"):
        hash(targets())
