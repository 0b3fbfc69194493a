"""Streaming covariance of a layer's output and how many dimensions it really uses.

Chunks merge exactly (Chan, Golub & LeVeque 1979, in matrix form); sums are float64. Shape letters: N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Comoment:
    """Sufficient statistics of a covariance: count, mean [D] and summed outer products of deviations [D, D], float64."""

    count: int
    mean_D: np.ndarray
    comoment_DD: np.ndarray

    @classmethod
    def of(cls, states_ND: Tensor) -> Comoment:
        """Return the statistics of one chunk, N >= 1 rows of any float dtype."""
        states = states_ND.double()
        mean_D = states.mean(dim=0)
        deviation = states - mean_D
        return cls(len(states), mean_D.cpu().numpy(), (deviation.T @ deviation).cpu().numpy())

    def merge(self, other: Comoment) -> Comoment:
        """Return the statistics of both chunks together."""
        n = self.count + other.count
        delta = other.mean_D - self.mean_D
        return Comoment(
            n,
            self.mean_D + delta * (other.count / n),
            self.comoment_DD + other.comoment_DD + np.outer(delta, delta) * (self.count * other.count / n),
        )

    def absorb(self, other: Comoment) -> Comoment:
        """Return the same as `merge`, bit for bit, in this one's memory: this one must not be used again."""
        n = self.count + other.count
        delta = other.mean_D - self.mean_D
        total_DD = self.comoment_DD
        total_DD += other.comoment_DD
        total_DD += np.outer(delta, delta) * (self.count * other.count / n)
        return Comoment(n, self.mean_D + delta * (other.count / n), total_DD)

    def subspace(self, share: float = 0.95) -> Subspace:
        """Return the principal subspace that holds `share` of the variance, all of it at most (`intrinsic_dimension`)."""
        values_D, vectors_DD = np.linalg.eigh(self.comoment_DD / self.count)
        values_D = np.clip(values_D[::-1], 0.0, None)
        basis_KD = vectors_DD.T[::-1][: intrinsic_dimension(values_D, share)]
        # An eigenvector's sign is arbitrary: its largest component is made positive, so that equal data give equal files.
        largest_K = np.take_along_axis(basis_KD, np.abs(basis_KD).argmax(axis=1)[:, None], axis=1)
        return Subspace(self.mean_D, basis_KD * np.sign(largest_K), values_D)

    def eigenvalues(self) -> np.ndarray:
        """Return the eigenvalues [D] of the population covariance, largest first, rounding below zero cut off."""
        return np.asarray(np.clip(np.linalg.eigvalsh(self.comoment_DD / self.count)[::-1], 0.0, None))


@dataclass(frozen=True, eq=False)
class Subspace:
    """The principal components of a layer's output, float64."""

    mean_D: np.ndarray
    basis_KD: np.ndarray
    """Orthonormal rows, the most variance first; K is 0 when nothing varies."""
    eigenvalues_D: np.ndarray
    """Of the whole population covariance, largest first."""


def intrinsic_dimension(eigenvalues_D: np.ndarray, share: float = 0.95) -> int:
    """Return the fewest principal components that hold `share` of the variance; 0 when nothing varies."""
    cumulative = np.cumsum(eigenvalues_D)
    if cumulative[-1] <= 0:
        return 0
    # The last sum may round below share * total only for share = 1; the clip keeps the answer a count of components.
    return int(min(np.searchsorted(cumulative, share * cumulative[-1]) + 1, len(eigenvalues_D)))


def participation_ratio(eigenvalues_D: np.ndarray) -> float:
    """Return (sum l)^2 / sum l^2: D when variance is spread evenly, 1 when one direction has it all, 0 when nothing varies."""
    squares = float(np.square(eigenvalues_D).sum())
    return float(eigenvalues_D.sum()) ** 2 / squares if squares > 0 else 0.0


def effective_rank(eigenvalues_D: np.ndarray) -> float:
    """Return exp of the entropy of the eigenvalues' shares (Roy & Vetterli 2007): D when variance is spread evenly, 1 when one
    direction has it all, 0 when nothing varies."""
    total = float(eigenvalues_D.sum())
    if total <= 0:
        return 0.0
    shares = eigenvalues_D[eigenvalues_D > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
