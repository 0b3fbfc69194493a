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

    Args and seeding: as `bootstrap_means`.
    """
    return percentile_interval(bootstrap_means(sums_LS, counts_S, seed=seed, num_resamples=num_resamples))


def percentile_interval(means_RL: np.ndarray) -> np.ndarray:
    """Return the 95 % interval [L, 2] of resampled means."""
    return np.asarray(np.percentile(means_RL, [2.5, 97.5], axis=0).T)


def bootstrap_means(
    sums_LS: np.ndarray, counts_S: np.ndarray, *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> np.ndarray:
    """Return [R, L]: `pooled_mean` of samples drawn again with replacement.

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
    return np.concatenate(means)


def critical_set(importance_L: np.ndarray) -> list[tuple[int, float]]:
    """Return (layer, weight) of the fewest layers that hold 90 % of the summed importance, at most 8, most important first.

    Args:
        importance_L: non-negative; a layer of importance 0 is never critical.

    Returns:
        Weights are proportional to importance and sum to 1; empty when no layer is important.
    """
    chosen = critical_masks(importance_L[None])[0]
    held = float(importance_L[chosen].sum())
    order = sorted(np.flatnonzero(chosen), key=lambda layer: (-importance_L[layer], layer))
    return [(int(layer), float(importance_L[layer]) / held) for layer in order]


def critical_masks(importance_RL: np.ndarray) -> np.ndarray:
    """Return bool [R, L]: the critical set of each row, as `critical_set` chooses it; of equals, the first layers."""
    order_RL = np.argsort(-importance_RL, axis=1, kind="stable")[:, :MAX_CRITICAL_LAYERS]
    sorted_RL = np.take_along_axis(importance_RL, order_RL, axis=1)
    before_RL = np.cumsum(sorted_RL, axis=1) - sorted_RL
    missing_RL = before_RL < CRITICAL_SHARE * importance_RL.sum(axis=1, keepdims=True)
    masks_RL = np.zeros(importance_RL.shape, dtype=bool)
    np.put_along_axis(masks_RL, order_RL, missing_RL & (sorted_RL > 0), axis=1)
    return masks_RL


def critical_stability(sums_LS: np.ndarray, counts_S: np.ndarray, *, seed: int) -> float:
    """Return how often samples drawn again give the same critical set, 0..1; 0 when that set is empty or there is one sample.

    In each resample a layer's importance is its mean less the distance between mean and lower bound in the whole sample: a second
    bootstrap inside the first would cost the square of it.
    """
    if len(counts_S) < 2:
        return 0.0
    means_RL = bootstrap_means(sums_LS, counts_S, seed=seed)
    low_L = percentile_interval(means_RL)[:, 0]
    reference_L = critical_masks(np.maximum(low_L, 0.0)[None])[0]
    if not reference_L.any():
        return 0.0
    shift_L = pooled_mean(sums_LS, counts_S) - low_L
    return float((critical_masks(np.maximum(means_RL - shift_L, 0.0)) == reference_L).all(axis=1).mean())
