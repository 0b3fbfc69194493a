"""The spike detector on series: its scores, and the state that a rollback returns."""

from __future__ import annotations

import json
import math
from collections import deque

import numpy as np
import pytest

from nexus.training.spikes import SpikeDetector, Watch


def detector(values: list[float]) -> SpikeDetector:
    made = SpikeDetector(window=8, warmup=4, floor=0.1)
    for value in values:
        made.accept(value)
    return made


def test_the_score_is_the_distance_to_the_median_in_robust_deviations() -> None:
    values = [0.0, 1.0, 2.0, 3.0, 10.0]
    deviation = 1.4826 * np.median(np.abs(np.array(values) - 2.0))
    assert detector(values).deviation() == pytest.approx(deviation)
    assert detector(values).score(7.0) == pytest.approx((7.0 - 2.0) / deviation)
    assert detector(values).score(-3.0) == pytest.approx(-5.0 / deviation)
    assert detector(values).excess(7.0) == pytest.approx(5.0)


def test_a_window_without_spread_is_scored_by_the_floor() -> None:
    assert detector([1.0] * 5).score(1.2) == pytest.approx(2.0)


def test_a_tenfold_leap_is_told_during_the_warm_up_once_eight_values_stand_and_not_after_it() -> None:
    made = SpikeDetector(window=16, warmup=10, floor=0.1)
    for count in range(12):
        assert made.leaps(math.log(21.0)) == (8 <= count < 10)
        assert not made.leaps(math.log(19.0))
        made.accept(math.log(2.0 if count % 2 else 1.0))


def test_nothing_is_scored_during_the_warm_up_nor_after_clearing() -> None:
    warming = detector([1.0, 2.0, 3.0])
    assert warming.score(100.0) is None
    assert warming.deviation() is None
    warming.accept(4.0)
    assert warming.score(100.0) is not None
    warming.clear()
    assert warming.score(100.0) is None


def test_only_the_last_values_count() -> None:
    moved = detector([100.0] * 8 + [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert moved.excess(4.5) == pytest.approx(0.0)


def test_the_average_is_bias_corrected() -> None:
    watch = Watch(detector([]), detector([]), deque(maxlen=5))
    losses = [4.0, 2.0, 1.0]
    for count, loss in enumerate(losses, start=1):
        watch.follow(loss, 0.9)
        weights = np.array([0.9 ** (count - 1 - index) for index in range(count)])
        assert watch.average == pytest.approx(float(weights @ losses[:count] / weights.sum()))


def test_a_restored_watch_is_equal_after_a_trip_through_json() -> None:
    watch = Watch(detector([1.0, 2.0]), detector([3.0]), deque(maxlen=5))
    watch.recent.append((True, 4, ("a", "b")))
    watch.streak.append((0.5, ("c",)))
    watch.follow(2.0, 0.9)
    watch.position, watch.drift, watch.generation, watch.nonfinite_streak = 7, 2, 1, 3
    restored = Watch(detector([9.0]), detector([]), deque([(False, 0, ())], maxlen=5))
    restored.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert restored.state_dict() == watch.state_dict()
    assert restored.recent == watch.recent
    assert restored.streak == watch.streak
