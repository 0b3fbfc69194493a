"""A linear probe on an encoder's pooled embedding: can the labels still be read off it when a layer is ablated?

Ridge regression on one-hot labels, from sums that merge exactly over batches and workers; each row is judged by the probe fitted
to all rows but itself (leave-one-out in closed form, Cook & Weisberg 1982, section 2.2). Shape letters: B rows, V variants,
E embedding width with a constant 1 at the end, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Relative to the mean square of an embedding's components: enough to fit fewer rows than dimensions, too little to bias many.
RIDGE = 1e-2


@dataclass(frozen=True, eq=False)
class ProbeStatistics:
    """Sums over clean embeddings from which the probe follows, float64."""

    gram_EE: np.ndarray
    class_sums: dict[int, np.ndarray]
    """Label -> summed embeddings [E] of its rows."""

    @classmethod
    def of(cls, embeddings_BE: np.ndarray, labels_B: np.ndarray) -> ProbeStatistics:
        """Return the sums of one batch; embeddings come without the constant."""
        rows_BE = _with_constant(embeddings_BE)
        return cls(
            rows_BE.T @ rows_BE, {int(label): rows_BE[labels_B == label].sum(axis=0) for label in np.unique(labels_B)}
        )

    def merge(self, other: ProbeStatistics) -> ProbeStatistics:
        """Return the sums of both batches together."""
        labels = sorted({*self.class_sums, *other.class_sums})
        nothing = np.zeros(len(self.gram_EE))
        return ProbeStatistics(
            self.gram_EE + other.gram_EE,
            {label: self.class_sums.get(label, nothing) + other.class_sums.get(label, nothing) for label in labels},
        )

    def fit(self) -> LinearProbe | None:
        """Return the probe; None with fewer than two classes, which need none."""
        if len(self.class_sums) < 2:
            return None
        labels = sorted(self.class_sums)
        ridge = RIDGE * float(np.trace(self.gram_EE)) / len(self.gram_EE)
        inverse_EE = np.linalg.inv(self.gram_EE + ridge * np.eye(len(self.gram_EE)))
        weights_EC = inverse_EE @ np.stack([self.class_sums[label] for label in labels], axis=1)
        return LinearProbe(inverse_EE, weights_EC, np.array(labels))


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """The fitted probe, and what takes a row out of the fit again."""

    inverse_EE: np.ndarray
    weights_EC: np.ndarray
    labels_C: np.ndarray

    def correct(self, embeddings_VBE: np.ndarray, labels_B: np.ndarray) -> np.ndarray:
        """Return bool [V, B]: whether the probe without row b names the label of row b from each variant's embedding.

        Args:
            embeddings_VBE: the clean embeddings first, which the probe was fitted to; without the constant.
        """
        z_VBE = _with_constant(embeddings_VBE)
        x_BE = z_VBE[0]
        truth_BC = (labels_B[:, None] == self.labels_C).astype(np.float64)
        u_BE = x_BE @ self.inverse_EE
        leverage_B = (x_BE * u_BE).sum(axis=-1)
        zu_VB = (z_VBE * u_BE).sum(axis=-1)
        # Sherman-Morrison on the inverse, and the row's own class sum taken off: z A^-1 M without row b.
        own_BC = (x_BE @ self.weights_EC - leverage_B[:, None] * truth_BC) / (1 - leverage_B)[:, None]
        scores_VBC = z_VBE @ self.weights_EC - zu_VB[..., None] * truth_BC + zu_VB[..., None] * own_BC
        return np.asarray(self.labels_C[scores_VBC.argmax(axis=-1)] == labels_B)


def _with_constant(embeddings: np.ndarray) -> np.ndarray:
    return np.concatenate([embeddings.astype(np.float64), np.ones((*embeddings.shape[:-1], 1))], axis=-1)
