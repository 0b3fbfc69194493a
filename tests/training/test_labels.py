"""A label distribution as next-token distributions: exact by enumeration of all label texts."""

from __future__ import annotations

import numpy as np
import pytest

from nexus.training.labels import LabelTokens

EOS = 0
# "1", "10", "12", "2" over digits, as the quickstart's sums of digits are.
PATHS = [(1, EOS), (1, 9, EOS), (1, 2, EOS), (2, EOS)]


def _random_logprobs(seed: int, rows: int = 5) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(rows, len(PATHS))) * 2
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_each_position_is_the_conditional_distribution_over_continuations(seed):
    logprobs_BC = _random_logprobs(seed)
    targets = LabelTokens(PATHS, vocabulary_size=12).targets(logprobs_BC)
    for row, logprobs_C in enumerate(logprobs_BC):
        path = PATHS[logprobs_C.argmax()]
        begin, end = targets.offsets_B1[row : row + 2]
        assert tuple(targets.token_ids_N[begin:end]) == path
        for depth in range(len(path)):
            expected = np.zeros(12)
            for probability, other in zip(np.exp(logprobs_C.astype(np.float64)), PATHS, strict=True):
                if other[:depth] == path[:depth]:
                    expected[other[depth]] += probability
            expected /= expected.sum()
            found = np.zeros(12)
            found[targets.ids_NK[begin + depth]] = np.exp(targets.logprobs_NK[begin + depth])
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_probability_of_the_path_is_that_of_its_label():
    logprobs_BC = _random_logprobs(9)
    targets = LabelTokens(PATHS, vocabulary_size=12).targets(logprobs_BC)
    for row, logprobs_C in enumerate(logprobs_BC):
        total = 0.0
        for position in range(*targets.offsets_B1[row : row + 2]):
            slot = list(targets.ids_NK[position]).index(targets.token_ids_N[position])
            total += targets.logprobs_NK[position, slot]
        assert total == pytest.approx(logprobs_C.max(), abs=1e-5)


def test_ids_are_distinct_so_that_the_tail_is_the_true_complement():
    targets = LabelTokens(PATHS, vocabulary_size=12).targets(_random_logprobs(1))
    for ids, logprobs in zip(targets.ids_NK, targets.logprobs_NK, strict=True):
        assert len(set(ids)) == len(ids)
        assert np.exp(logprobs).sum() == pytest.approx(1.0, abs=1e-5)


def test_a_certain_teacher_gives_a_certain_path_without_nan():
    logprobs = np.full((1, 4), -np.inf, dtype=np.float32)
    logprobs[0, 1] = 0.0
    targets = LabelTokens(PATHS, vocabulary_size=12).targets(logprobs)
    assert tuple(targets.token_ids_N) == (1, 9, EOS)
    assert not np.isnan(targets.logprobs_NK).any()


def test_labels_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match=r"classes \[0, 2\] with the same"):
        LabelTokens([(1, EOS), (2, EOS), (1, EOS)], vocabulary_size=4)
