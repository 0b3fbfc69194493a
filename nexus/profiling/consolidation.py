"""From measured batches to one profile: merged in an order that does not depend on who finished first.

Shape letters: L blocks, V = L+1 variants (the clean one first), B samples of one measurement, S samples of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np

from nexus.artifacts import CriticalLayer, LayerProfile, NIWTProfile, ProfileBaseline
from nexus.errors import ProfilingError
from nexus.profiling.activation import ActivationMoments
from nexus.profiling.spectral import Comoment, intrinsic_dimension
from nexus.profiling.statistics import NUM_RESAMPLES, bootstrap_interval, critical_set, pooled_mean

Metric = Literal["delta_nll", "label_nll", "cosine_drop"]

# With fewer samples, chance alone gives all of them one sign, and so a one-sided interval, more often than 2.5 % (2**-6 = 1.6 %).
_MIN_RELIABLE_SAMPLES = 6


@dataclass(frozen=True, eq=False)
class BatchMeasurement:
    """What one batch says about every layer. Plain NumPy: it pickles, and measurements of any batches merge exactly."""

    metric: Metric
    strategy: str
    sample_ids: tuple[str, ...]
    token_counts_B: np.ndarray
    """int64; scored tokens of each sample, 1 for encoders."""
    clean_nll_B: np.ndarray | None
    """float64; summed nats of each sample's scored tokens (or label) under the clean model; None for embeddings."""
    delta_LB: np.ndarray
    """float64; how much skipping each layer adds to that sum, or the drop of the embedding's cosine similarity."""
    correct_VB: np.ndarray | None
    """bool; whether every scored token (or the label) is the argmax; None where there is no right answer."""
    moments_L: tuple[ActivationMoments, ...]
    comoments_L: tuple[Comoment, ...]


def merge_measurements(measurements: Sequence[BatchMeasurement]) -> BatchMeasurement:
    """Return one measurement of all samples, sorted by sample id whatever the order given.

    Raises:
        ProfilingError: there is none, or they measure different things.
    """
    if not measurements:
        raise ProfilingError("Expected at least one measured batch, found none. Give the profiler samples.")
    kinds = {(m.metric, m.strategy, len(m.delta_LB), m.correct_VB is None) for m in measurements}
    if len(kinds) > 1:
        raise ProfilingError(
            "Expected measurements of one model by one metric and strategy, all with labels or none, found (metric, strategy, "
            f"layers, unlabelled) of {sorted(kinds)}. Measure again with one profiler."
        )
    # Floating-point sums depend on their order: ids fix it, and the values fix it where ids repeat.
    ordered = sorted(measurements, key=lambda m: (m.sample_ids, m.delta_LB.tolist()))
    first = ordered[0]
    sample_ids = [sample_id for m in ordered for sample_id in m.sample_ids]
    by_id = sorted(range(len(sample_ids)), key=lambda index: sample_ids[index])
    return BatchMeasurement(
        metric=first.metric,
        strategy=first.strategy,
        sample_ids=tuple(sample_ids[index] for index in by_id),
        token_counts_B=np.concatenate([m.token_counts_B for m in ordered])[by_id],
        clean_nll_B=_concatenate([m.clean_nll_B for m in ordered], by_id),
        delta_LB=np.concatenate([m.delta_LB for m in ordered], axis=-1)[:, by_id],
        correct_VB=_concatenate([m.correct_VB for m in ordered], by_id),
        moments_L=tuple(
            reduce(ActivationMoments.merge, parts) for parts in zip(*(m.moments_L for m in ordered), strict=True)
        ),
        comoments_L=tuple(
            reduce(Comoment.merge, parts) for parts in zip(*(m.comoments_L for m in ordered), strict=True)
        ),
    )


def consolidate(
    measurements: Sequence[BatchMeasurement],
    *,
    teacher: str,
    revision: str,
    seconds: float,
    seed: int,
    strategy: str | None = None,
    num_resamples: int = NUM_RESAMPLES,
    partial: bool = False,
    note: str | None = None,
) -> NIWTProfile:
    """Return the profile that `measurements` support; the same whatever their order.

    A layer's importance is the lower end of the 95 % bootstrap interval of max(0, delta): what it is worth at least. The critical
    layers are the fewest that hold 90 % of all importance; none is named without significance, and `note` then says so.

    Args:
        seconds: wall-clock time that the measurements took.
        seed: of the bootstrap.
        strategy: written into the profile; None takes the measurements'.
        note: put in front of the profile's own remarks.

    Raises:
        ProfilingError: as `merge_measurements`.
    """
    merged = merge_measurements(measurements)
    num_samples = len(merged.sample_ids)
    delta_L = pooled_mean(merged.delta_LB, merged.token_counts_B)
    ci_L2 = bootstrap_interval(merged.delta_LB, merged.token_counts_B, seed=seed, num_resamples=num_resamples)
    # One sample has no spread to draw from: its interval is a point and shows nothing.
    importance_L = np.maximum(ci_L2[:, 0], 0.0) if num_samples > 1 else np.zeros(len(delta_L))
    critical = critical_set(importance_L)
    accuracy_V = None if merged.correct_VB is None else merged.correct_VB.mean(axis=1)
    notes = [] if note is None else [note]
    if num_samples < _MIN_RELIABLE_SAMPLES:
        notes.append(
            f"Only {num_samples} samples: intervals are too narrow; {_MIN_RELIABLE_SAMPLES} is the least to rely on."
        )
    if not critical:
        notes.append("No layer's effect is significant at 95 %: no critical layers. Profile more samples.")
    return NIWTProfile(
        teacher=teacher,
        revision=revision,
        num_layers=len(delta_L),
        num_samples=num_samples,
        metric=merged.metric,
        strategy=merged.strategy if strategy is None else strategy,
        baseline=ProfileBaseline(
            nll=None if merged.clean_nll_B is None else float(merged.clean_nll_B.sum() / merged.token_counts_B.sum()),
            accuracy=None if accuracy_V is None else float(accuracy_V[0]),
        ),
        layers=tuple(
            LayerProfile(
                layer=layer,
                delta_nll=float(delta_L[layer]),
                ci95=(float(ci_L2[layer, 0]), float(ci_L2[layer, 1])),
                accuracy_drop=None if accuracy_V is None else float(accuracy_V[0] - accuracy_V[layer + 1]),
                activation=merged.moments_L[layer].summary(),
                intrinsic_dim=float(intrinsic_dimension(merged.comoments_L[layer].eigenvalues())),
            )
            for layer in range(len(delta_L))
        ),
        critical_layers=tuple(CriticalLayer(layer=layer, weight=weight) for layer, weight in critical),
        seconds=seconds,
        partial=partial,
        note=" ".join(notes) or None,
    )


def _concatenate(parts: Sequence[np.ndarray | None], order: Sequence[int]) -> np.ndarray | None:
    """Return the parts joined along the samples in the given order, or None where they are absent."""
    present = [part for part in parts if part is not None]
    return np.concatenate(present, axis=-1)[..., order] if present else None
