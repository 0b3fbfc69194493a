"""Telling a loss or gradient spike from noise, by the median and the median absolute deviation of what was accepted before.

A mean and a standard deviation are moved by the very outliers that they should find: after one nan they refuse everything or
nothing (OLMo-core's SkipStepOptimizer; ZClip, arXiv 2504.02507). A median is not, and a refused value never enters the window.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nexus.training.sample_quarantine import BatchKey

MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal variable whose median absolute deviation is 1."""


LEAP = math.log(10.0)
"""Beyond the highest value of a window that is too short for a score; noise does not go there (a score of 6 is at least 20 % for a
loss and 2.9 times for a gradient norm)."""
LEAP_VALUES = 8
"""Accepted values before a leap can be told; the first steps of a run may well grow tenfold."""


class SpikeDetector:
    """Robust z-scores of one series over a window of accepted values.

    Args:
        window: accepted values to look back on.
        warmup: accepted values before anything is scored.
        floor: least deviation, in the unit of the series.
    """

    def __init__(self, *, window: int, warmup: int, floor: float) -> None:
        self.warmup = warmup
        self.floor = floor
        self._values: deque[float] = deque(maxlen=window)

    def score(self, value: float) -> float | None:
        """z of `value`; None during the warm-up."""
        spread = self._spread()
        return None if spread is None else (value - spread[0]) / max(spread[1], self.floor)

    def leaps(self, value: float) -> bool:
        """Whether `value`, a logarithm, is ten times the highest of the window during the warm-up."""
        return LEAP_VALUES <= len(self._values) < self.warmup and value - max(self._values) > LEAP

    def excess(self, value: float) -> float:
        """How far `value` lies above the median of the window."""
        return value - float(np.median(np.array(self._values)))

    def deviation(self) -> float | None:
        """1.4826 MAD of the window, without the floor; None during the warm-up."""
        spread = self._spread()
        return None if spread is None else spread[1]

    def _spread(self) -> tuple[float, float] | None:
        if len(self._values) < self.warmup:
            return None
        values = np.array(self._values)
        median = float(np.median(values))
        return median, MAD_TO_SIGMA * float(np.median(np.abs(values - median)))

    def accept(self, value: float) -> None:
        """Add a value that belongs to the series."""
        self._values.append(value)

    def clear(self) -> None:
        """Forget everything: the warm-up begins again."""
        self._values.clear()

    def state_dict(self) -> list[float]:
        return list(self._values)

    def load_state_dict(self, state: Sequence[float]) -> None:
        self.clear()
        self._values.extend(state)


@dataclass
class Watch:
    """The detectors' side of a training state: what a rollback returns, and what a run that never saw the batch would hold."""

    losses: SpikeDetector
    grad_norms: SpikeDetector
    recent: deque[tuple[bool, int, BatchKey]]
    """(flagged, position, batch) of the last steps."""
    position: int = 0
    """Accepted steps on this trajectory."""
    average: float = 0.0
    """Bias-corrected moving average of the loss."""
    num_averaged: int = 0
    drift: int = 0
    """Steps in a row for which the average was too high."""
    generation: int = 0
    """Counts re-baselinings; losses of different generations are not compared."""
    streak: list[tuple[float, BatchKey]] = field(default_factory=list)
    """The flags in a row so far: by how much, in log, the higher of the two series exceeded its median, and the batch."""
    nonfinite_streak: int = 0

    def follow(self, loss: float, decay: float) -> None:
        """Move the average: a plain mean at first, a geometric one later (the bias correction of Adam, in place)."""
        self.num_averaged += 1
        self.average += (1.0 - decay) / (1.0 - decay**self.num_averaged) * (loss - self.average)

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": self.losses.state_dict(),
            "grad_norms": self.grad_norms.state_dict(),
            "recent": [[flagged, position, list(key)] for flagged, position, key in self.recent],
            "streak": [[jump, list(key)] for jump, key in self.streak],
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.load_state_dict(state["losses"])
        self.grad_norms.load_state_dict(state["grad_norms"])
        self.recent.clear()
        self.recent.extend((flagged, position, tuple(key)) for flagged, position, key in state["recent"])
        self.streak = [(jump, tuple(key)) for jump, key in state["streak"]]
        for name in _NUMBERS:
            setattr(self, name, state[name])


_NUMBERS = ("position", "average", "num_averaged", "drift", "generation", "nonfinite_streak")
