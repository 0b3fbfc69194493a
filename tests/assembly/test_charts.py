"""Geometry of the report's drawings."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.assembly import charts


def points_of(path: str) -> list[tuple[float, float]]:
    """Coordinates of an SVG path of M, L and Z."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def drawn(losses: list[float]) -> charts.Curve:
    curve = charts.curve(list(enumerate(losses)), [], len(losses) - 1)
    assert curve is not None
    return curve


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6) | st.floats(1e-9, 1e3) | st.just(math.nan), min_size=1, max_size=400))
def test_every_point_and_tick_lies_in_the_box(losses: list[float]) -> None:
    curve = charts.curve(list(enumerate(losses)), [(0, "skip", "first")], len(losses) - 1)
    if curve is None:
        assert all(math.isnan(loss) for loss in losses)
        return
    for x, y in [*points_of(curve.line), *points_of(curve.band)]:
        assert charts.LEFT - 0.1 <= x <= charts.WIDTH - charts.RIGHT + 0.1
        assert charts.TOP - 0.1 <= y <= charts.HEIGHT - charts.BOTTOM + 0.1
    for tick in curve.y_ticks:
        assert charts.TOP - 0.1 <= tick.position <= charts.HEIGHT - charts.BOTTOM + 0.1
    assert 2 <= len(curve.y_ticks) <= 8
    assert 1 <= len(curve.x_ticks) <= 6


def test_a_falling_loss_is_drawn_falling_from_left_to_right() -> None:
    points = points_of(drawn([5.0, 4.0, 3.0, 2.5]).line)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points)
    assert points[0][0] == charts.LEFT
    assert points[-1][0] == charts.WIDTH - charts.RIGHT


def test_heights_are_proportional_on_a_linear_axis_that_begins_at_zero() -> None:
    curve = drawn([4.0, 2.0, 1.0])
    bottom = charts.HEIGHT - charts.BOTTOM
    heights = [bottom - y for _, y in points_of(curve.line)]
    assert not curve.logarithmic
    assert heights[0] / heights[1] == pytest.approx(2, abs=0.01)
    assert heights[0] / heights[2] == pytest.approx(4, abs=0.02)
    assert [tick.text for tick in curve.y_ticks] == ["0", "1", "2", "3", "4"]


def test_a_wide_range_is_drawn_in_equal_steps_per_power_of_ten() -> None:
    curve = drawn([100.0, 10.0, 1.0, 0.1])
    heights = [y for _, y in points_of(curve.line)]
    assert curve.logarithmic
    assert np.diff(heights) == pytest.approx([np.diff(heights)[0]] * 3, abs=0.15)
    assert [tick.text for tick in curve.y_ticks] == ["0.1", "1", "10", "100"]


def test_many_powers_of_ten_are_thinned_out() -> None:
    curve = drawn([1e-9, 1e9])
    assert [tick.text for tick in curve.y_ticks][:2] == ["1e-09", "1e-05"]


def test_a_loss_of_zero_or_less_keeps_the_linear_axis() -> None:
    assert not drawn([100.0, 0.0]).logarithmic
    assert [tick.text for tick in drawn([-1.0, 1.0]).y_ticks] == ["-1", "-0.5", "0", "0.5", "1"]


def test_a_constant_zero_loss_can_be_drawn() -> None:
    assert len(points_of(drawn([0.0, 0.0]).line)) == 2


def test_the_curve_says_where_it_began_and_ended() -> None:
    curve = drawn([4.0, 3.0, 1.5])
    assert (curve.first, curve.last) == (4.0, 1.5)


def test_a_step_trained_again_counts_with_its_last_value() -> None:
    again = charts.curve([(0, 4.0), (1, 50.0), (1, 3.0)], [], 1)
    assert again == charts.curve([(0, 4.0), (1, 3.0)], [], 1)


def test_steps_without_a_finite_loss_are_left_out() -> None:
    assert charts.curve([(0, 4.0), (1, math.nan), (2, 2.0)], [], 2) == charts.curve([(0, 4.0), (2, 2.0)], [], 2)
    assert charts.curve([(0, math.inf)], [], 0) is None
    assert charts.curve([], [], 0) is None


def test_long_runs_are_drawn_as_bucket_means_inside_their_extremes() -> None:
    losses = np.random.default_rng(0).lognormal(0, 0.1, 10_000)
    curve = drawn(losses.tolist())
    line, band = points_of(curve.line), points_of(curve.band)
    assert len(line) == charts.MAX_BUCKETS
    assert len(band) == 2 * charts.MAX_BUCKETS
    assert curve.band.endswith("Z")
    assert curve.first == pytest.approx(losses[:63].mean())
    lower = band[: charts.MAX_BUCKETS - 1 : -1]
    for (_, middle), (_, top), (_, bottom) in zip(line, band, lower, strict=False):
        assert top <= middle <= bottom


def test_events_are_marked_at_their_steps() -> None:
    curve = charts.curve([(0, 2.0), (100, 1.0)], [(0, "skip", "a"), (50, "rollback", "b"), (100, "spike", "c")], 100)
    assert curve is not None
    right = charts.WIDTH - charts.RIGHT
    assert [(mark.x, mark.kind, mark.title) for mark in curve.marks] == [
        (charts.LEFT, "skip", "a"),
        ((charts.LEFT + right) / 2, "rollback", "b"),
        (right, "spike", "c"),
    ]


@pytest.mark.parametrize(
    ("last_step", "ticks"),
    [
        (0, ["0"]),
        (1, ["0"]),
        (2, ["0", "1", "2"]),
        (900, ["0", "200", "400", "600", "800"]),
        (800, ["0", "200", "400", "600", "800"]),
    ],
)
def test_the_step_axis_has_round_ticks(last_step: int, ticks: list[str]) -> None:
    curve = charts.curve([(0, 1.0)], [], last_step)
    assert curve is not None
    assert [tick.text for tick in curve.x_ticks] == ticks


def test_thousands_of_steps_are_grouped() -> None:
    curve = charts.curve([(0, 1.0)], [], 40_000)
    assert curve is not None
    assert [tick.text for tick in curve.x_ticks] == ["0", "10,000", "20,000", "30,000", "40,000"]


def test_large_losses_have_ticks_without_exponent() -> None:
    assert [tick.text for tick in drawn([2000.0, 4000.0]).y_ticks] == ["0", "1000", "2000", "3000", "4000"]


def strokes_of(path: str) -> list[tuple[float, float]]:
    """(x, height) of each upright stroke."""
    found = re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)", path)
    return [(float(x), float(bottom) - float(top)) for x, top, bottom in found]


def test_the_loudest_part_of_a_recording_is_the_tallest_stroke() -> None:
    samples = np.concatenate([np.full(480, 0.1), np.full(480, -0.8)])
    strokes = strokes_of(charts.waveform_path(samples))
    assert len(strokes) == charts.WAVE_BARS
    assert all(0 < x < charts.WAVE_WIDTH for x, _ in strokes)
    assert strokes[-1][1] == pytest.approx(charts.WAVE_HEIGHT - 4, abs=0.2)
    assert strokes[0][1] == pytest.approx((charts.WAVE_HEIGHT - 4) / 8, abs=0.2)


def test_silence_is_a_row_of_dots() -> None:
    assert {height for _, height in strokes_of(charts.waveform_path(np.zeros(1000)))} == {0.0}


def test_fewer_samples_than_strokes_give_one_stroke_each() -> None:
    assert len(strokes_of(charts.waveform_path(np.array([0.5, -0.5, 0.1])))) == 3
