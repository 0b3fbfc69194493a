"""Broken replies, one of each kind, and what they raise; sound replies raise nothing."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nexus.towers.health import (
    FingerprintChangedError,
    NotFiniteError,
    RowCountError,
    TeacherHealthError,
    UniformOutputError,
    check_reply,
    check_targets,
)
from nexus.towers.targets import FullTargets, SparseTargets, TeacherTargets, TokensAlone, TokenTargets

V = 50
TOKENS = TokenTargets(
    np.array([0, 1, 3]),
    np.array([1, 2, 3], np.int32),
    np.zeros((3, 4), np.int32),
    np.log(np.tile(np.float32([0.6, 0.2, 0.1, 0.1]), (3, 1))),
    # All mass is kept: nothing may be left outside.
    np.full(3, -np.inf, np.float32),
)
SPARSE = SparseTargets(np.array([0, 1, 3]), np.array([0, 1, 1, 2]), np.int32([4, 9]), np.float32([1, 2]), 16)
GOOD = TeacherTargets(
    teacher="t",
    fingerprint="f",
    tokenizer_hash="h",
    row_ids=("a", "b"),
    tokens=TOKENS,
    hidden={0: np.ones((3, 8), np.float16)},
    pooled_BE=np.ones((2, 4), np.float32),
    label_texts=("x", "y"),
    label_logprobs_BC=np.float32([[0, -np.inf], [-0.7, -0.7]]),
    features={1: SPARSE},
)


def test_a_sound_reply_passes() -> None:
    check_targets(GOOD, vocabulary_size=V)
    check_reply(GOOD, row_ids=("a", "b"), fingerprint="f")
    check_targets(
        replace(GOOD, tokens=None, features=None, pooled_BE=None, label_logprobs_BC=None), vocabulary_size=None
    )
    check_targets(replace(GOOD, tokens=TokensAlone(TOKENS.offsets_B1, TOKENS.token_ids_N)), vocabulary_size=V)


def uniform(tokens: int) -> TokenTargets:
    logprobs_NK = np.full((tokens, 4), -math.log(V), np.float32)
    return replace(TOKENS, logprobs_NK=logprobs_NK, tail_logprob_N=np.full(tokens, math.log(1 - 4 / V), np.float32))


def test_uniform_distributions_everywhere_are_no_teacher() -> None:
    with pytest.raises(UniformOutputError, match=r"3 uniform distributions over 50 tokens.*teacher 't'"):
        check_targets(replace(GOOD, tokens=uniform(3)), vocabulary_size=V)


def test_one_undecided_token_among_others_is_no_fault() -> None:
    mixed = replace(TOKENS, logprobs_NK=np.vstack([uniform(1).logprobs_NK, TOKENS.logprobs_NK[1:]]))
    check_targets(replace(GOOD, tokens=mixed), vocabulary_size=V)


def spoiled(array: np.ndarray, value: float = np.nan) -> np.ndarray:
    copy = array.copy()
    copy.flat[-1] = value
    return copy


NOT_FINITE: dict[str, dict[str, Any]] = {
    "log-probabilities": {"tokens": replace(TOKENS, logprobs_NK=spoiled(TOKENS.logprobs_NK))},
    "probabilities": {
        "tokens": FullTargets(np.array([0, 1, 2]), np.int32([1, 2]), np.float32([[0, -1], [-1, np.nan]]))
    },
    "tail masses": {"tokens": replace(TOKENS, tail_logprob_N=spoiled(TOKENS.tail_logprob_N))},
    "hidden states of layer 0": {"hidden": {0: spoiled(GOOD.hidden[0], np.inf)}},
    "features of layer 1": {"features": {1: replace(SPARSE, values_Z=spoiled(SPARSE.values_Z))}},
    "embeddings": {"pooled_BE": spoiled(np.ones((2, 4), np.float32))},
    "label probabilities": {"label_logprobs_BC": np.float32([[0, 0], [0, np.nan]])},
}


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_of_a_whole_distribution_some_ids_may_be_impossible_and_not_all(value: float) -> None:
    logprobs_NV = np.float32([[-0.1, -np.inf, -2.3], [-0.1, -np.inf, -2.3]])
    tokens = FullTargets(np.array([0, 1, 2]), np.int32([1, 2]), logprobs_NV)
    sound = replace(GOOD, tokens=tokens, hidden={}, features=None)
    check_targets(sound, vocabulary_size=3)
    logprobs_NV[1] = value
    with pytest.raises(NotFiniteError, match="finite probabilities from teacher 't'"):
        check_targets(sound, vocabulary_size=3)


@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_is_named(name: str) -> None:
    with pytest.raises(NotFiniteError, match=f"finite {name} from teacher 't'"):
        check_targets(replace(GOOD, **NOT_FINITE[name]), vocabulary_size=V)


ROWS: dict[str, dict[str, Any]] = {
    "tokens": {"tokens": replace(TOKENS, offsets_B1=np.array([0, 3]))},
    "features of layer 1": {"features": {1: replace(SPARSE, offsets_B1=np.array([0, 3]))}},
    "embeddings": {"pooled_BE": np.ones((3, 4), np.float32)},
    "labels": {"label_logprobs_BC": np.zeros((1, 2), np.float32)},
}


@pytest.mark.parametrize("name", ROWS)
def test_arrays_of_another_number_of_rows_are_named(name: str) -> None:
    with pytest.raises(RowCountError, match=f"2 rows in {name} of teacher 't'"):
        check_targets(replace(GOOD, **ROWS[name]), vocabulary_size=V)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"row_ids": ("a",)}, RowCountError, "2 rows of the request .* found 1 rows"),
        ({"row_ids": ("b", "a")}, RowCountError, "in its order"),
        (
            {"fingerprint": "e"},
            FingerprintChangedError,
            "fingerprint f, found e: it changed during the run. Profile and extract again",
        ),
    ],
)
def test_a_reply_to_another_question_or_from_another_teacher(
    changes: dict[str, Any], error: type[TeacherHealthError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        check_reply(replace(GOOD, **changes), row_ids=("a", "b"), fingerprint="f")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.teacher) == (error, str(caught.value), "t")
