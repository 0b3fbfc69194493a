"""How many samples a profile takes, and which of them its second pass looks at again.

Shape letters: L blocks, S samples.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from nexus.profiling.consolidation import BatchMeasurement
from nexus.profiling.statistics import critical_stability

STABLE_SHARE = 0.95
"""Sampling ends when this share of bootstrap resamples has the same critical layers."""

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class SamplingPlan:
    """When sampling ends."""

    max_samples: int
    min_samples: int
    """First look at the critical layers; the next ones at twice, four times, ... as many samples. Few looks at fixed counts, because
    who looks after every sample stops by chance (Wald 1945)."""
    budget_seconds: float | None = None
    """No further batch is begun after so long; None sets no limit."""

    def __post_init__(self) -> None:
        """Refuse what cannot be followed."""
        if not 1 <= self.min_samples <= self.max_samples:
            raise ValueError(
                f"Expected 1 <= min_samples <= max_samples, found {self.min_samples} and {self.max_samples}. Lower min_samples."
            )

    @property
    def look_counts(self) -> tuple[int, ...]:
        """Numbers of samples at which the critical layers are looked at, and the limit."""
        counts = [self.min_samples]
        while 2 * counts[-1] < self.max_samples:
            counts.append(2 * counts[-1])
        return tuple(dict.fromkeys([*counts, self.max_samples]))


def is_stable(merged: BatchMeasurement, *, seed: int) -> bool:
    """Return whether more samples are not expected to change the critical layers; never while there are none."""
    if merged.other_side is not None and not is_stable(merged.other_side, seed=seed):
        return False
    return critical_stability(merged.delta_LB, merged.token_counts_B, seed=seed) >= STABLE_SHARE


def budget_note(num_samples: int, budget_seconds: float) -> str:
    """Return what a profile says whose time was up."""
    return f"Stopped after {num_samples} samples: the budget of {budget_seconds:g} s was spent."


class Reservoir(Generic[RowT]):
    """Keeps a fixed number of rows, chosen by a hash of their ids: the same ones whatever the order and the batches."""

    def __init__(self, size: int) -> None:
        self._size = size
        # Largest hash first; the counter settles equal ids.
        self._heap: list[tuple[int, int, str, RowT]] = []
        self._offered = 0

    def offer(self, sample_ids: Sequence[str], rows: Sequence[RowT]) -> None:
        """Consider rows with their ids."""
        for sample_id, row in zip(sample_ids, rows, strict=True):
            self._offered += 1
            digest = hashlib.sha256(sample_id.encode()).digest()
            heapq.heappush(self._heap, (-int.from_bytes(digest[:8], "big"), -self._offered, sample_id, row))
            if len(self._heap) > self._size:
                heapq.heappop(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def rows(self) -> Iterator[RowT]:
        """Yield the kept rows, sorted by their ids."""
        for _, _, _, row in sorted(self._heap, key=lambda kept: (kept[2], -kept[1])):
            yield row
