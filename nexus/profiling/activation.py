"""Streaming moments of a layer's output, per hidden dimension.

Batches and workers are merged exactly with the pairwise update of Chan, Golub & LeVeque (1979), extended to third and fourth
moments by Pebay (2008, Sandia report SAND2008-6212, equations 2.1-2.2); all sums are float64. Shape letters: N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nexus.artifacts import ActivationSummary

IMPORTANT_SHARE = 0.95
"""Share of a layer's variance that its important dimensions hold; the share that counts principal components too."""


@dataclass(frozen=True, eq=False)
class ActivationMoments:
    """Sums from which the first four moments of each hidden dimension follow; float64 arrays [D]."""

    count: int
    mean_D: np.ndarray
    m2_D: np.ndarray
    """Sum of squared deviations from the mean; `m3_D`, `m4_D` of their third and fourth powers."""
    m3_D: np.ndarray
    m4_D: np.ndarray
    abs_sum_D: np.ndarray
    abs_max_D: np.ndarray

    @classmethod
    def of(cls, states_ND: Tensor) -> ActivationMoments:
        """Return the moments of one chunk, N >= 1 rows of any float dtype."""
        states = states_ND.double()
        mean_D = states.mean(dim=0)
        deviation = states - mean_D
        square = deviation * deviation
        absolute = states.abs()
        sums = torch.stack(
            [
                mean_D,
                square.sum(dim=0),
                (square * deviation).sum(dim=0),
                (square * square).sum(dim=0),
                absolute.sum(dim=0),
                absolute.amax(dim=0),
            ]
        )
        return cls(len(states), *sums.cpu().numpy())

    def merge(self, other: ActivationMoments) -> ActivationMoments:
        """Return the moments of both chunks together."""
        a, b, n = self.count, other.count, self.count + other.count
        delta = other.mean_D - self.mean_D
        step = delta / n
        return ActivationMoments(
            count=n,
            mean_D=self.mean_D + step * b,
            m2_D=self.m2_D + other.m2_D + delta * step * a * b,
            m3_D=self.m3_D
            + other.m3_D
            + delta * step**2 * a * b * (a - b)
            + 3 * step * (a * other.m2_D - b * self.m2_D),
            m4_D=self.m4_D
            + other.m4_D
            + delta * step**3 * a * b * (a * a - a * b + b * b)
            + 6 * step**2 * (a * a * other.m2_D + b * b * self.m2_D)
            + 4 * step * (a * other.m3_D - b * self.m3_D),
            abs_sum_D=self.abs_sum_D + other.abs_sum_D,
            abs_max_D=np.maximum(self.abs_max_D, other.abs_max_D),
        )

    def per_dimension(self) -> dict[str, np.ndarray]:
        """Return float32 [D] `mean`, `variance` (population), `kurtosis` (m4/m2^2; 0 where a dimension never varies), `abs_max`, and
        the bool `importance_mask` of `important_dimensions`."""
        variance_D = self.m2_D / self.count
        squares_D = self.m2_D**2
        kurtosis_D = np.divide(self.count * self.m4_D, squares_D, out=np.zeros_like(squares_D), where=squares_D > 0)
        values = {"mean": self.mean_D, "variance": variance_D, "kurtosis": kurtosis_D, "abs_max": self.abs_max_D}
        return {
            **{name: value_D.astype(np.float32) for name, value_D in values.items()},
            "importance_mask": important_dimensions(variance_D),
        }

    def summary(self) -> ActivationSummary:
        """Return means over the hidden dimensions: of |x|, of the (population) variance and of the kurtosis m4/m2^2 (3 for a
        normal distribution; dimensions that never vary have none and are left out, 0 if none varies), and the largest |x|."""
        varies_D = self.m2_D > 0
        kurtosis = self.count * self.m4_D[varies_D] / self.m2_D[varies_D] ** 2
        return ActivationSummary(
            mean_abs=float(self.abs_sum_D.mean() / self.count),
            variance=float(self.m2_D.mean() / self.count),
            kurtosis=float(kurtosis.mean()) if len(kurtosis) else 0.0,
            abs_max=float(self.abs_max_D.max()),
        )


@dataclass(frozen=True, eq=False)
class MeanUpdate:
    """Sums from which the mean of what a block adds to its input follows; float64 [D]."""

    count: int
    sum_D: np.ndarray

    @classmethod
    def of(cls, updates_ND: Tensor) -> MeanUpdate:
        """Return the sums of one chunk, N >= 1 rows of any float dtype."""
        return cls(len(updates_ND), updates_ND.double().sum(dim=0).cpu().numpy())

    def merge(self, other: MeanUpdate) -> MeanUpdate:
        """Return the sums of both chunks together."""
        return MeanUpdate(self.count + other.count, self.sum_D + other.sum_D)

    @property
    def mean_D(self) -> np.ndarray:
        """The mean update, float64 [D]."""
        return self.sum_D / self.count


def important_dimensions(variance_D: np.ndarray, share: float = IMPORTANT_SHARE) -> np.ndarray:
    """Return bool [D]: the fewest dimensions that hold `share` of the summed variance; none when nothing varies.

    Variance and not magnitude, because a language model's largest activations are constants that say nothing about the input
    (Sun et al. 2024, https://arxiv.org/abs/2402.17762).
    """
    order = np.argsort(-variance_D, kind="stable")
    held = np.cumsum(variance_D[order])
    mask_D = np.zeros(len(variance_D), dtype=bool)
    if held[-1] > 0:
        mask_D[order[: np.searchsorted(held, share * held[-1]) + 1]] = True
    return mask_D
