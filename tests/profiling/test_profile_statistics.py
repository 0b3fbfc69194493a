"""The paired bootstrap and the smallest critical set."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from nexus.profiling import statistics
from nexus.profiling.statistics import bootstrap_interval, critical_set, pooled_mean


def test_samples_are_pooled_by_their_tokens():
    assert pooled_mean(np.array([[2.0, 6.0], [0.0, -4.0]]), np.array([1, 3])).tolist() == [2.0, -1.0]


def test_the_interval_of_a_mean_is_close_to_students():
    samples = np.random.default_rng(0).normal(0.3, 1.0, size=400)
    low, high = bootstrap_interval(samples[None], np.ones(400), seed=0)[0]
    expected = stats.t.interval(0.95, 399, samples.mean(), stats.sem(samples))
    # 2000 resamples estimate a percentile to about 3 % of the interval's width (0.2).
    assert (low, high) == pytest.approx(expected, abs=0.01)


def test_intervals_cover_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        samples = generator.normal(1.0, 2.0, size=60)
        low, high = bootstrap_interval(samples[None], np.ones(60), seed=trial, num_resamples=400)[0]
        covered += low <= 1.0 <= high
    # Binomial(200, .95): fewer than 178 has probability below 1e-4 (the percentile interval covers slightly less: .94).
    assert 178 <= covered < 200


def test_long_samples_weigh_more():
    counts = np.array([1, 1, 1, 1000])
    sums = np.array([[0.0, 0.0, 0.0, 1000.0]])
    low, high = bootstrap_interval(sums, counts, seed=0)[0]
    # Without the long sample the mean is 0, with it nearly 1.
    assert low == 0
    assert high > 0.99


def test_equal_samples_leave_no_width():
    assert bootstrap_interval(np.full((2, 5), 0.5), np.ones(5), seed=0) == pytest.approx(0.5)


def test_layers_are_resampled_together():
    samples = np.random.default_rng(2).normal(size=30)
    intervals = bootstrap_interval(np.stack([samples, samples + 1, -samples]), np.ones(30), seed=0)
    np.testing.assert_allclose(intervals[1], intervals[0] + 1, rtol=1e-9)
    np.testing.assert_allclose(intervals[2], -intervals[0][::-1], rtol=1e-9)


def test_the_seed_fixes_the_interval():
    samples = np.random.default_rng(3).normal(size=(1, 20))
    first = bootstrap_interval(samples, np.ones(20), seed=5)
    assert np.array_equal(first, bootstrap_interval(samples, np.ones(20), seed=5))
    assert not np.array_equal(first, bootstrap_interval(samples, np.ones(20), seed=6))


def test_many_samples_are_resampled_in_bounded_chunks():
    # 40,000 samples: 104 resamples at a time.
    samples = np.random.default_rng(4).normal(0.5, 1.0, size=(1, 40_000))
    low, high = bootstrap_interval(samples, np.ones(40_000), seed=0, num_resamples=120)[0]
    assert low < samples.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 200, rel=0.3)


def test_the_fewest_layers_with_90_percent_are_critical():
    assert critical_set(np.array([0.0, 6.0, 1.0, 3.0])) == [(1, pytest.approx(6 / 9)), (3, pytest.approx(3 / 9))]
    assert critical_set(np.array([1.0, 0.0, 1.0])) == [(0, 0.5), (2, 0.5)]


def test_a_single_layer_has_all_the_weight():
    assert critical_set(np.array([0.0, 0.3, 0.01])) == [(1, 1.0)]


def test_at_most_eight_layers_are_critical_and_their_weights_sum_to_one():
    critical = critical_set(np.arange(1.0, 21.0))
    assert [layer for layer, _ in critical] == [19, 18, 17, 16, 15, 14, 13, 12]
    assert sum(weight for _, weight in critical) == pytest.approx(1)
    assert len(critical) == statistics.MAX_CRITICAL_LAYERS


def test_nothing_important_is_nothing_critical():
    assert critical_set(np.zeros(4)) == []
