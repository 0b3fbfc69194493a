"""Paired bootstrap over samples, and the smallest set of layers that carries a capability.

Shape letters: L layers, S samples, R bootstrap resamples.
"""

from __future__ import annotations

import numpy as np

NUM_RESAMPLES = 2000
"""The 2.5 % percentile of 2000 resamples is an average over 50 of them: its own error is a few percent of the interval."""

MAX_CRITICAL_LAYERS = 8
CRITICAL_SHARE = 0.9

# Resample counts held at a time: 2**22 float64 values are 32 MiB.
_COUNTS_PER_CHUNK = 2**22


def pooled_mean(sums_LS: np.ndarray, counts_S: np.ndarray) -> np.ndarray:
    """Return [L]: the sums over all samples per counted token."""
    return np.asarray(sums_LS.sum(axis=1) / counts_S.sum())


def bootstrap_interval(
    sums_LS: np.ndarray, counts_S: np.ndarray, *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> np.ndarray:
    """Return the 95 % percentile interval [L, 2] of `pooled_mean` when samples are drawn again with replacement.

    Samples are resampled whole (Efron & Tibshirani 1993, chapter 13), the same ones for all layers, so that differences between
    layers stay paired.

    Args:
        sums_LS: per-sample sums of a paired difference.
        counts_S: tokens behind each sum, at least 1.
    """
    num_samples = len(counts_S)
    generator = np.random.default_rng(seed)
    chunk = max(1, _COUNTS_PER_CHUNK // num_samples)
    means = []
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        drawn_RS = generator.integers(num_samples, size=(size, num_samples))
        # How often each resample drew each sample, counted: several times faster than NumPy's multinomial.
        cells = (drawn_RS + num_samples * np.arange(size)[:, None]).ravel()
        draws_RS = np.bincount(cells, minlength=size * num_samples).reshape(size, num_samples).astype(np.float64)
        means.append((draws_RS @ sums_LS.T) / (draws_RS @ counts_S)[:, None])
    return np.asarray(np.percentile(np.concatenate(means), [2.5, 97.5], axis=0).T)


def critical_set(importance_L: np.ndarray) -> list[tuple[int, float]]:
    """Return (layer, weight) of the fewest layers that hold 90 % of the summed importance, at most 8, most important first.

    Args:
        importance_L: non-negative; a layer of importance 0 is never critical.

    Returns:
        Weights are proportional to importance and sum to 1; empty when no layer is important.
    """
    order = sorted(np.flatnonzero(importance_L > 0), key=lambda layer: (-importance_L[layer], layer))
    chosen: list[int] = []
    held = 0.0
    for layer in order[:MAX_CRITICAL_LAYERS]:
        chosen.append(int(layer))
        held += float(importance_L[layer])
        if held >= CRITICAL_SHARE * float(importance_L.sum()):
            break
    return [(layer, float(importance_L[layer]) / held) for layer in chosen]
