"""From measured batches to one profile: merged in an order that does not depend on who finished first.

Measuring has two passes. The first skips every layer on every sample and gathers what is streamed (`BatchMeasurement`). What needs
its result, because it uses averages over all data or looks at critical layers only, is measured by the second one on some of the
samples (`plan_confirmation`, `ConfirmationMeasurement`). Shape letters: L blocks, V = L+1 variants (the clean one first),
K interventions, B samples of one measurement, S samples of all, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save

from nexus.artifacts import (
    AblationEffect,
    CriticalLayer,
    LayerEffect,
    LayerProfile,
    NIWTProfile,
    ProfileBaseline,
    write_bytes_atomically,
)
from nexus.errors import ProfilingError
from nexus.profiling.activation import ActivationMoments, MeanUpdate
from nexus.profiling.layers import Side
from nexus.profiling.probe import LinearProbe, ProbeStatistics
from nexus.profiling.spectral import (
    Comoment,
    Subspace,
    effective_rank,
    intrinsic_dimension,
    participation_ratio,
)
from nexus.profiling.statistics import (
    NUM_RESAMPLES,
    bootstrap_interval,
    critical_set,
    critical_stability,
    pooled_mean,
)

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
    kl_LB: np.ndarray | None
    """float64; summed KL(clean || skipped) of the scored tokens (or the label's distribution); None for embeddings."""
    cosine_drop_LB: np.ndarray | None
    """float64; drop of the cosine similarity of an encoder's pooled embedding; None for language models."""
    correct_VB: np.ndarray | None
    """bool; whether every scored token (or the label) is the argmax; None where there is no right answer."""
    moments_L: tuple[ActivationMoments, ...]
    comoments_L: tuple[Comoment, ...]
    updates_L: tuple[MeanUpdate, ...]
    probe: ProbeStatistics | None
    """Of an encoder's pooled embeddings, where there are labels."""
    side: Side | None = None
    path: str | None = None
    """Where the layers are (`BlockStack`)."""
    other_side: BatchMeasurement | None = None
    """Of an encoder-decoder: what the layers of its other side do on the same samples."""

    @property
    def is_labelled(self) -> bool:
        """Whether the samples' true answers were known; measurements with and without them are of different things."""
        return self.correct_VB is not None or self.probe is not None


@dataclass(frozen=True, eq=False)
class Effects:
    """What interventions do to samples; float64 sums over scored tokens as in `BatchMeasurement`."""

    delta_KB: np.ndarray
    kl_KB: np.ndarray | None


@dataclass(frozen=True, eq=False)
class ConfirmationPlan:
    """What the second pass needs to know of the first."""

    mean_updates_LD: tuple[np.ndarray, ...]
    critical_layers: tuple[int, ...]
    subspaces: tuple[Subspace, ...]
    """Of the critical layers."""
    probe: LinearProbe | None
    seed: int
    """Of the noise."""
    other_side: ConfirmationPlan | None = None
    """Of an encoder-decoder."""


@dataclass(frozen=True, eq=False)
class ConfirmationMeasurement:
    """What one batch says in the second pass."""

    sample_ids: tuple[str, ...]
    token_counts_B: np.ndarray
    mean_ablation: Effects
    noise_ablation: Effects
    reconstruction: Effects
    """Of the plan's critical layers."""
    probe_correct_VB: np.ndarray | None
    """bool; whether the linear probe names the label, each layer skipped in turn."""
    generated_correct_VB: np.ndarray | None
    """bool; whether the greedy completion holds the answer, each layer skipped in turn; None where verification is equivalent."""
    other_side: ConfirmationMeasurement | None = None
    """Of an encoder-decoder."""


def merge_measurements(measurements: Sequence[BatchMeasurement]) -> BatchMeasurement:
    """Return one measurement of all samples, sorted by sample id whatever the order given.

    Measurements of any batches can be merged at once, one after the other, or group by group: samples come out the same, streamed
    statistics within 1e-10.

    Raises:
        ProfilingError: there is none, or they measure different things.
    """
    return _merged(measurements, Comoment.merge)


def fold_measurement(total: BatchMeasurement | None, part: BatchMeasurement) -> BatchMeasurement:
    """Return what `merge_measurements` returns of both, in the memory of their covariances, which take most of it: neither must be
    used again.

    Raises:
        ProfilingError: they measure different things.
    """
    return part if total is None else _merged([total, part], Comoment.absorb)


def _merged(
    measurements: Sequence[BatchMeasurement], join: Callable[[Comoment, Comoment], Comoment]
) -> BatchMeasurement:
    if not measurements:
        raise ProfilingError("Expected at least one measured batch, found none. Give the profiler samples.")
    kinds = {(m.metric, len(m.delta_LB), not m.is_labelled, m.path or "") for m in measurements}
    if len(kinds) > 1:
        raise ProfilingError(
            "Expected measurements of one model by one metric, all with labels or none, found (metric, layers, unlabelled, path) of "
            f"{sorted(kinds)}. Measure again with one profiler."
        )
    # Floating-point sums depend on their order: ids fix it, and the values fix it where ids repeat.
    ordered = sorted(measurements, key=lambda m: (m.sample_ids, m.delta_LB.tolist()))
    first = ordered[0]
    others = [m.other_side for m in ordered if m.other_side is not None]
    sample_ids = [sample_id for m in ordered for sample_id in m.sample_ids]
    by_id = _by_id(sample_ids, np.concatenate([m.delta_LB for m in ordered], axis=-1))
    return BatchMeasurement(
        metric=first.metric,
        # Strategies give equal results, and each batch has the one that is cheapest for its shape.
        strategy="+".join(sorted({name for m in ordered for name in m.strategy.split("+")})),
        sample_ids=tuple(sample_ids[index] for index in by_id),
        token_counts_B=np.concatenate([m.token_counts_B for m in ordered])[by_id],
        clean_nll_B=_concatenate([m.clean_nll_B for m in ordered], by_id),
        delta_LB=np.concatenate([m.delta_LB for m in ordered], axis=-1)[:, by_id],
        kl_LB=_concatenate([m.kl_LB for m in ordered], by_id),
        cosine_drop_LB=_concatenate([m.cosine_drop_LB for m in ordered], by_id),
        correct_VB=_concatenate([m.correct_VB for m in ordered], by_id),
        moments_L=tuple(
            reduce(ActivationMoments.merge, parts) for parts in zip(*(m.moments_L for m in ordered), strict=True)
        ),
        comoments_L=tuple(_joined(parts, join) for parts in zip(*(m.comoments_L for m in ordered), strict=True)),
        updates_L=tuple(reduce(MeanUpdate.merge, parts) for parts in zip(*(m.updates_L for m in ordered), strict=True)),
        probe=_merged_probe([m.probe for m in ordered]),
        side=first.side,
        path=first.path,
        other_side=_merged(others, join) if others else None,
    )


def _joined(parts: Sequence[Comoment], join: Callable[[Comoment, Comoment], Comoment]) -> Comoment:
    # Once the first two have made a new one, that one can take up the others.
    return reduce(Comoment.absorb, parts[2:], join(parts[0], parts[1])) if len(parts) > 1 else parts[0]


def plan_confirmation(merged: BatchMeasurement, *, seed: int) -> ConfirmationPlan:
    """Return what the second pass is to do, given the first one's merged measurement; `seed` as for `consolidate`."""
    critical = tuple(layer for layer, _ in _critical_layers(merged, seed=seed, num_resamples=NUM_RESAMPLES))
    return ConfirmationPlan(
        mean_updates_LD=tuple(update.mean_D for update in merged.updates_L),
        critical_layers=critical,
        subspaces=tuple(merged.comoments_L[layer].subspace() for layer in critical),
        probe=None if merged.probe is None else merged.probe.fit(),
        seed=seed,
        other_side=None if merged.other_side is None else plan_confirmation(merged.other_side, seed=seed),
    )


def _by_id(sample_ids: Sequence[str], values_LB: np.ndarray) -> list[int]:
    """Return the columns in the order of the ids and, where one repeats, of the values: not in that of the batches."""
    return sorted(range(len(sample_ids)), key=lambda index: (sample_ids[index], values_LB[:, index].tolist()))


def merge_confirmations(parts: Sequence[ConfirmationMeasurement]) -> ConfirmationMeasurement:
    """Return one measurement of all samples, at least one, sorted by sample id whatever the order given."""
    sample_ids = [sample_id for part in parts for sample_id in part.sample_ids]
    by_id = _by_id(sample_ids, np.concatenate([part.mean_ablation.delta_KB for part in parts], axis=-1))
    others = [part.other_side for part in parts if part.other_side is not None]

    def effects(chosen: Sequence[Effects]) -> Effects:
        return Effects(
            np.concatenate([e.delta_KB for e in chosen], axis=-1)[:, by_id],
            _concatenate([e.kl_KB for e in chosen], by_id),
        )

    return ConfirmationMeasurement(
        sample_ids=tuple(sample_ids[index] for index in by_id),
        token_counts_B=np.concatenate([part.token_counts_B for part in parts])[by_id],
        mean_ablation=effects([part.mean_ablation for part in parts]),
        noise_ablation=effects([part.noise_ablation for part in parts]),
        reconstruction=effects([part.reconstruction for part in parts]),
        probe_correct_VB=_concatenate([part.probe_correct_VB for part in parts], by_id),
        generated_correct_VB=_concatenate([part.generated_correct_VB for part in parts], by_id),
        other_side=merge_confirmations(others) if others else None,
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
    confirmations: Sequence[ConfirmationMeasurement] = (),
    capabilities: Mapping[str, Sequence[BatchMeasurement]] | None = None,
    stopped_early: bool = False,
    tensors: str | None = None,
) -> NIWTProfile:
    """Return the profile that `measurements` support; the same whatever their order.

    A layer's importance is the lower end of the 95 % bootstrap interval of max(0, delta): what it is worth at least. The critical
    layers are the fewest that hold 90 % of all importance; none is named without significance, and `note` then says so.

    Args:
        seconds: wall-clock time that the measurements took.
        seed: of the bootstrap.
        strategy: written into the profile; None takes the measurements'.
        note: put in front of the profile's own remarks.
        confirmations: of the second pass, planned from the same measurements and seed; without any, its values are absent.
        capabilities: the same measurements by capability; the effects on each are told apart when there are several.
        tensors: name of the file that `write_tensors` writes.

    Raises:
        ProfilingError: as `merge_measurements`.
    """
    merged = merge_measurements(measurements)
    num_samples, num_layers = merged.delta_LB.shape[1], len(merged.delta_LB)

    def interval(sums_KS: np.ndarray, counts_S: np.ndarray) -> list[tuple[float, float]]:
        rows_K2 = bootstrap_interval(sums_KS, counts_S, seed=seed, num_resamples=num_resamples)
        return [(float(low), float(high)) for low, high in rows_K2]

    def effects(found: Effects, counts_S: np.ndarray) -> list[AblationEffect]:
        delta_K = pooled_mean(found.delta_KB, counts_S)
        kl_K: Sequence[float | None] | None = _pooled_or_none(found.kl_KB, counts_S)
        return [
            AblationEffect(delta_nll=float(delta), ci95=ci95, kl_nats=kl)
            for delta, ci95, kl in zip(
                delta_K, interval(found.delta_KB, counts_S), kl_K or [None] * len(delta_K), strict=True
            )
        ]

    def layer_effects(part: BatchMeasurement) -> tuple[LayerEffect, ...]:
        delta_L = pooled_mean(part.delta_LB, part.token_counts_B)
        return tuple(
            LayerEffect(layer=layer, delta_nll=float(delta), ci95=ci95)
            for layer, (delta, ci95) in enumerate(
                zip(delta_L, interval(part.delta_LB, part.token_counts_B), strict=True)
            )
        )

    skipped = layer_effects(merged)
    critical = _critical_layers(merged, seed=seed, num_resamples=num_resamples)
    confirmed = merge_confirmations(confirmations) if confirmations else None
    confirmed_counts_S = np.zeros(0) if confirmed is None else confirmed.token_counts_B
    generated_VS = None if confirmed is None else confirmed.generated_correct_VB
    correct_VS = merged.correct_VB if generated_VS is None else generated_VS
    probe_VS = None if confirmed is None else confirmed.probe_correct_VB
    mean_L = None if confirmed is None else effects(confirmed.mean_ablation, confirmed_counts_S)
    noise_L = None if confirmed is None else effects(confirmed.noise_ablation, confirmed_counts_S)
    checks = [] if confirmed is None else effects(confirmed.reconstruction, confirmed_counts_S)
    checked = dict(zip((layer for layer, _ in critical), checks, strict=True)) if confirmed is not None else {}
    kl_L = _pooled_or_none(merged.kl_LB, merged.token_counts_B)
    cosine_L = _pooled_or_none(merged.cosine_drop_LB, np.ones(num_samples))
    drop_LS = None if correct_VS is None else correct_VS[:1].astype(np.float64) - correct_VS[1:]
    drop_ci_L = None if drop_LS is None else interval(drop_LS, np.ones(drop_LS.shape[1]))
    notes = [] if note is None else [note]
    if num_samples < _MIN_RELIABLE_SAMPLES:
        notes.append(
            f"Only {num_samples} samples: intervals are too narrow; {_MIN_RELIABLE_SAMPLES} is the least to rely on."
        )
    if not critical:
        notes.append("No layer's effect is significant at 95 %: no critical layers. Profile more samples.")
    layers = []
    for layer in range(num_layers):
        eigenvalues_D = merged.comoments_L[layer].eigenvalues()
        layers.append(
            LayerProfile(
                layer=layer,
                delta_nll=skipped[layer].delta_nll,
                ci95=skipped[layer].ci95,
                accuracy_drop=None if drop_LS is None else float(drop_LS[layer].mean()),
                accuracy_drop_ci95=None if drop_ci_L is None else drop_ci_L[layer],
                activation=merged.moments_L[layer].summary(),
                intrinsic_dim=float(intrinsic_dimension(eigenvalues_D)),
                participation_ratio=participation_ratio(eigenvalues_D),
                effective_rank=effective_rank(eigenvalues_D),
                kl_nats=None if kl_L is None else kl_L[layer],
                cosine_drop=None if cosine_L is None else cosine_L[layer],
                probe_accuracy_drop=None
                if probe_VS is None
                else float(probe_VS[0].mean() - probe_VS[layer + 1].mean()),
                mean_ablation=None if mean_L is None else mean_L[layer],
                noise_ablation=None if noise_L is None else noise_L[layer],
            )
        )
    return NIWTProfile(
        teacher=teacher,
        revision=revision,
        num_layers=num_layers,
        num_samples=num_samples,
        metric=merged.metric,
        strategy=merged.strategy if strategy is None else strategy,
        baseline=ProfileBaseline(
            nll=None if merged.clean_nll_B is None else float(merged.clean_nll_B.sum() / merged.token_counts_B.sum()),
            accuracy=None if correct_VS is None else float(correct_VS[0].mean()),
            probe_accuracy=None if probe_VS is None else float(probe_VS[0].mean()),
        ),
        layers=tuple(layers),
        critical_layers=tuple(
            CriticalLayer(layer=layer, weight=weight, reconstruction=checked.get(layer)) for layer, weight in critical
        ),
        seconds=seconds,
        partial=partial,
        note=" ".join(notes) or None,
        accuracy_by=_judged_by(merged, generated_VS),
        num_confirmed=0 if confirmed is None else len(confirmed.sample_ids),
        critical_stability=critical_stability(merged.delta_LB, merged.token_counts_B, seed=seed) if critical else None,
        stopped_early=stopped_early,
        tensors=tensors if critical else None,
        capabilities={name: layer_effects(merge_measurements(parts)) for name, parts in capabilities.items()}
        if capabilities is not None and len(capabilities) > 1
        else {},
        side=merged.side,
        path=merged.path,
        other_side=None
        if merged.other_side is None
        else consolidate(
            [merged.other_side],
            teacher=teacher,
            revision=revision,
            seconds=seconds,
            seed=seed,
            num_resamples=num_resamples,
            partial=partial,
            confirmations=[c.other_side for c in confirmations if c.other_side is not None],
            capabilities=None
            if capabilities is None
            else {
                name: [m.other_side for m in parts if m.other_side is not None] for name, parts in capabilities.items()
            },
            stopped_early=stopped_early,
            tensors=tensors if critical else None,
        ),
    )


def write_tensors(path: Path, merged: BatchMeasurement, plan: ConfirmationPlan) -> None:
    """Write the critical layers' statistics as safetensors, atomically: for each `layers.<index>.` `mean`, `variance`, `kurtosis`,
    `abs_max`, `importance_mask` [D], `pca_basis` [K, D] (orthonormal rows), `pca_mean` and `eigenvalues` [D]. Those of an
    encoder-decoder's other side are under `other_side.layers.<index>.`.

    Raises:
        ArtifactError: when the disk refuses.
    """
    write_bytes_atomically(path, save(_tensors_of(merged, plan)))


def _tensors_of(merged: BatchMeasurement, plan: ConfirmationPlan) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for layer, subspace in zip(plan.critical_layers, plan.subspaces, strict=True):
        arrays = {
            **merged.moments_L[layer].per_dimension(),
            "pca_basis": subspace.basis_KD.astype(np.float32),
            "pca_mean": subspace.mean_D.astype(np.float32),
            "eigenvalues": subspace.eigenvalues_D.astype(np.float32),
        }
        # safetensors writes the memory as it lies: a view in another order would come back transposed.
        tensors |= {f"layers.{layer}.{name}": np.ascontiguousarray(array) for name, array in arrays.items()}
    if merged.other_side is not None and plan.other_side is not None:
        tensors |= {
            f"other_side.{name}": array for name, array in _tensors_of(merged.other_side, plan.other_side).items()
        }
    return tensors


def _critical_layers(merged: BatchMeasurement, *, seed: int, num_resamples: int) -> list[tuple[int, float]]:
    low_L = bootstrap_interval(merged.delta_LB, merged.token_counts_B, seed=seed, num_resamples=num_resamples)[:, 0]
    # One sample has no spread to draw from: its interval is a point and shows nothing.
    return critical_set(np.maximum(low_L, 0.0)) if merged.delta_LB.shape[1] > 1 else []


def _judged_by(
    merged: BatchMeasurement, generated_VS: np.ndarray | None
) -> Literal["verification", "generation", "label"] | None:
    if generated_VS is not None:
        return "generation"
    if merged.correct_VB is None:
        return None
    return "verification" if merged.metric == "delta_nll" else "label"


def _pooled_or_none(sums_KS: np.ndarray | None, counts_S: np.ndarray) -> list[float] | None:
    return None if sums_KS is None else [float(value) for value in pooled_mean(sums_KS, counts_S)]


def _merged_probe(parts: Sequence[ProbeStatistics | None]) -> ProbeStatistics | None:
    present = [part for part in parts if part is not None]
    return reduce(ProbeStatistics.merge, present) if present else None


def _concatenate(parts: Sequence[np.ndarray | None], order: Sequence[int]) -> np.ndarray | None:
    """Return the parts joined along the samples in the given order, or None where they are absent."""
    present = [part for part in parts if part is not None]
    return np.concatenate(present, axis=-1)[..., order] if present else None
