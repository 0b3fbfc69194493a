"""Geometry of the report's drawings: numbers in, coordinates and SVG paths out. The template draws them; nothing here is HTML.

A loss curve can have millions of steps; it is drawn as at most `MAX_BUCKETS` bucket means inside the band of their extremes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_BUCKETS = 160
"""About one per two units of the drawing's width; more could not be told apart."""
LOG_RATIO = 20.0
"""Above this ratio of largest to smallest mean, a linear axis would hide everything after the first steps."""

WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 8.0, 18.0, 24.0
"""Margins in drawing units: tick labels stand left and below, marks above."""

WAVE_BARS = 96
WAVE_WIDTH, WAVE_HEIGHT = 288.0, 64.0


@dataclass(frozen=True)
class Tick:
    """A label on an axis, at `position` drawing units along it."""

    position: float
    text: str


@dataclass(frozen=True)
class Mark:
    """An event on the step axis."""

    x: float
    kind: str
    title: str


@dataclass(frozen=True)
class Curve:
    """One loss curve, ready to draw in a WIDTH x HEIGHT box."""

    line: str
    """SVG path through the bucket means."""
    band: str
    """SVG path around the buckets' extremes, closed."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    first: float
    last: float
    """Means of the first and last bucket."""
    logarithmic: bool


@dataclass(frozen=True)
class DepthCurve:
    """One model's layers in a DepthChart."""

    line: str
    """SVG path through the layers."""
    points: tuple[tuple[float, float], ...]
    whiskers: tuple[tuple[float, float, float], ...]
    """(x, upper end, lower end) of each layer's interval."""


@dataclass(frozen=True)
class DepthChart:
    """Models of any depth over one axis, ready to draw in a WIDTH x HEIGHT box."""

    curves: tuple[DepthCurve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def depth_chart(models: Sequence[Sequence[tuple[float, float, float]]]) -> DepthChart:
    """The drawing of (effect, low, high) of every layer of some models, from input (depth 0) to output (depth 1).

    Effects are drawn as shares of the model's own largest one, because models are measured in different units; a layer stands at
    the middle of its share of the depth.
    """
    shares = []
    for layers in models:
        values = np.array(layers, dtype=np.float64)
        largest = float(np.abs(values[:, 0]).max())
        shares.append(values / (largest if largest > 0 else 1.0))
    low, high, ticks = _linear_axis(np.concatenate([values.ravel() for values in shares]))

    def y_of(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    def x_of(depth: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * depth

    curves = []
    for values in shares:
        places = [x_of((layer + 0.5) / len(values)) for layer in range(len(values))]
        points = [(x, y_of(float(effect))) for x, effect in zip(places, values[:, 0], strict=True)]
        whiskers = [
            (x, y_of(float(top)), y_of(float(bottom))) for x, (_, bottom, top) in zip(places, values, strict=True)
        ]
        curves.append(
            DepthCurve(
                line=_path(points),
                points=tuple((round(x, 1), round(y, 1)) for x, y in points),
                whiskers=tuple((round(x, 1), round(top, 1), round(bottom, 1)) for x, top, bottom in whiskers),
            )
        )
    return DepthChart(
        curves=tuple(curves),
        x_ticks=tuple(Tick(round(x_of(quarter / 4), 1), f"{quarter / 4:g}") for quarter in range(5)),
        y_ticks=tuple(Tick(round(y_of(value), 1), f"{100 * value:.0f} %") for value in ticks),
    )


def curve(points: Sequence[tuple[int, float]], events: Sequence[tuple[int, str, str]], last_step: int) -> Curve | None:
    """The drawing of (step, loss) points with (step, kind, title) events over steps 0..last_step; None without a finite point.

    A step that was trained again after a rollback counts with its last value. Values beyond the axis are cut off at its edge.
    """
    kept = dict(points)
    steps = np.array([step for step in sorted(kept) if math.isfinite(kept[step])], dtype=np.float64)
    if steps.size == 0:
        return None
    losses = np.array([kept[int(step)] for step in steps])
    buckets = np.array_split(np.arange(steps.size), min(MAX_BUCKETS, steps.size))
    centres = np.array([steps[bucket].mean() for bucket in buckets])
    means = np.array([losses[bucket].mean() for bucket in buckets])
    logarithmic = bool(means.min() > 0 and means.max() / means.min() > LOG_RATIO)
    low, high, ticks = _log_axis(means) if logarithmic else _linear_axis(means)

    def x_of(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last_step, 1)

    def y_of(value: float) -> float:
        place = (
            math.log10(max(value, low) / low) / math.log10(high / low) if logarithmic else (value - low) / (high - low)
        )
        return TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - min(max(place, 0.0), 1.0))

    upper = [(x_of(c), y_of(losses[b].max())) for c, b in zip(centres, buckets, strict=True)]
    lower = [(x_of(c), y_of(losses[b].min())) for c, b in zip(centres, buckets, strict=True)]
    return Curve(
        line=_path([(x_of(c), y_of(m)) for c, m in zip(centres, means, strict=True)]),
        band=_path([*upper, *reversed(lower)]) + "Z",
        x_ticks=tuple(Tick(round(x_of(step), 1), f"{step:,}") for step in _step_ticks(last_step)),
        y_ticks=tuple(Tick(round(y_of(value), 1), _short(value)) for value in ticks),
        marks=tuple(Mark(round(x_of(step), 1), kind, title) for step, kind, title in events),
        first=float(means[0]),
        last=float(means[-1]),
        logarithmic=logarithmic,
    )


def waveform_path(samples: np.ndarray) -> str:
    """SVG path of a recording's envelope: WAVE_BARS upright strokes, the loudest filling WAVE_HEIGHT; silence stays a row of dots."""
    parts = np.array_split(np.abs(samples), min(WAVE_BARS, samples.size))
    peaks = np.array([part.max() for part in parts])
    peaks = peaks / max(float(peaks.max()), 1e-9)
    step, middle = WAVE_WIDTH / len(parts), WAVE_HEIGHT / 2
    # A stroke of zero length still shows its round caps, as a dot.
    return "".join(
        f"M{(bar + 0.5) * step:.1f} {middle - peak * (middle - 2):.1f}V{middle + peak * (middle - 2):.1f}"
        for bar, peak in enumerate(peaks)
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _linear_axis(values: np.ndarray) -> tuple[float, float, list[float]]:
    """(low, high, ticks) with round steps; includes zero when all values are positive, so that heights can be compared."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 4)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    return first * step, last * step, [index * step for index in range(first, last + 1)]


def _log_axis(values: np.ndarray) -> tuple[float, float, list[float]]:
    """(low, high, ticks) at powers of ten around the values; every second or third when there are many."""
    first = math.floor(math.log10(float(values.min())))
    last = math.ceil(math.log10(float(values.max())))
    stride = 1 + (last - first) // 6
    return 10.0**first, 10.0**last, [10.0**power for power in range(first, last + 1, stride)]


def _step_ticks(last_step: int) -> list[int]:
    """0, round steps between, none so near the end that its label would be cut."""
    if last_step < 2:
        return [0]
    scale = 10 ** math.floor(math.log10(last_step / 2))
    step = next(scale * factor for factor in (1, 2, 5, 10) if last_step / (scale * factor) <= 5)
    return list(range(0, last_step + 1, step))


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
