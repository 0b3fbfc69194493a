"""When sampling ends, and which rows are kept for the second pass."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from nexus.profiling.batches import ProfileBatch, rows_of
from nexus.profiling.niwt import NIWTProfiler, SamplingPlan
from nexus.profiling.sampling import Reservoir
from nexus.profiling.statistics import critical_masks, critical_set, critical_stability


@pytest.fixture(scope="module")
def many_rows(lookup_task) -> ProfileBatch:
    """The lookup's eight rows, three times."""
    return ProfileBatch(
        [f"sample-{row:02}" for row in range(24)],
        lookup_task.input_ids_BT.repeat(3, 1),
        lookup_task.attention_mask_BT.repeat(3, 1),
        lookup_task.loss_mask_BT.repeat(3, 1),
    )


def batches_of(batch: ProfileBatch, size: int) -> list[ProfileBatch]:
    return [rows_of(batch, slice(start, start + size)) for start in range(0, batch.num_rows, size)]


@pytest.mark.parametrize("size", [1, 4, 5, 24])
def test_sampling_ends_at_a_fixed_count_whatever_the_batches(lookup_task, many_rows, size):
    sampling = SamplingPlan(max_samples=20, min_samples=6)
    profiler = NIWTProfiler(lookup_task.model)
    profile = profiler.profile(iter(batches_of(many_rows, size)), sampling=sampling, confirm_samples=0)
    assert (profile.num_samples, profile.stopped_early, profile.partial) == (6, True, False)
    assert profile.critical_stability >= 0.95
    reference = profiler.profile([rows_of(many_rows, slice(0, 6))], confirm_samples=0)
    assert [layer.layer for layer in profile.critical_layers] == [layer.layer for layer in reference.critical_layers]
    found, expected = ([layer.delta_nll for layer in p.layers] for p in (profile, reference))
    assert found == pytest.approx(expected, rel=0, abs=1e-5)


def test_sampling_goes_on_to_its_limit_while_nothing_is_significant(own_qwen3):
    """Blocks that do next to nothing, scored on answers at random: their effects are as often good as bad."""
    with torch.no_grad():
        for block in own_qwen3.model.layers:
            block.self_attn.o_proj.weight.mul_(1e-3)
            block.mlp.down_proj.weight.mul_(1e-3)
    ids_BT = torch.randint(3, 100, (24, 6), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(ids_BT)
    batch = ProfileBatch([f"s{row:02}" for row in range(24)], ids_BT, mask_BT, mask_BT)
    profile = NIWTProfiler(own_qwen3).profile(
        batches_of(batch, 5), sampling=SamplingPlan(max_samples=20, min_samples=5), confirm_samples=0
    )
    assert profile.critical_layers == ()
    assert profile.note == "No layer's effect is significant at 95 %: no critical layers. Profile more samples."
    assert (profile.num_samples, profile.stopped_early, profile.partial) == (20, False, False)


def test_a_stream_that_ends_before_the_limit_is_not_called_an_early_stop(lookup_task, many_rows):
    profile = NIWTProfiler(lookup_task.model).profile(
        [many_rows], sampling=SamplingPlan(max_samples=100, min_samples=50), confirm_samples=0
    )
    assert (profile.num_samples, profile.stopped_early, profile.partial) == (24, False, False)


def test_a_spent_budget_ends_with_what_is_known_marked_partial(lookup_task, many_rows):
    sampling = SamplingPlan(max_samples=24, min_samples=24, budget_seconds=0.0)
    profile = NIWTProfiler(lookup_task.model).profile(batches_of(many_rows, 8), sampling=sampling)
    assert profile.partial
    assert profile.num_samples == 8
    assert profile.note == "Stopped after 8 samples: the budget of 0 s was spent."
    assert profile.critical_layers[0].layer == lookup_task.critical_layer
    assert profile.num_confirmed == 8


def test_a_budget_that_is_not_spent_leaves_no_trace(lookup_task, many_rows):
    sampling = SamplingPlan(max_samples=16, min_samples=16, budget_seconds=3600.0)
    profile = NIWTProfiler(lookup_task.model).profile(batches_of(many_rows, 8), sampling=sampling, confirm_samples=0)
    assert (profile.num_samples, profile.partial, profile.note) == (16, False, None)


def test_looks_are_few_and_end_with_the_limit():
    assert SamplingPlan(max_samples=256, min_samples=64).look_counts == (64, 128, 256)
    assert SamplingPlan(max_samples=300, min_samples=64).look_counts == (64, 128, 256, 300)
    assert SamplingPlan(max_samples=64, min_samples=64).look_counts == (64,)


@pytest.mark.parametrize(("low", "high"), [(0, 5), (6, 5)])
def test_a_plan_that_cannot_be_followed_is_refused(low, high):
    with pytest.raises(ValueError, match=f"1 <= min_samples <= max_samples, found {low} and {high}"):
        SamplingPlan(max_samples=high, min_samples=low)


def test_the_same_rows_are_kept_whatever_their_order():
    ids = [f"row-{index}" for index in range(6)]
    kept = set()
    for order in permutations(ids):
        reservoir: Reservoir[str] = Reservoir(3)
        reservoir.offer(order[:4], [name.upper() for name in order[:4]])
        reservoir.offer(order[4:], [name.upper() for name in order[4:]])
        assert len(reservoir) == 3
        kept.add(tuple(reservoir.rows()))
    assert len(kept) == 1
    assert set(next(iter(kept))) < {name.upper() for name in ids}


def test_rows_with_equal_ids_are_kept_as_they_came():
    reservoir: Reservoir[int] = Reservoir(3)
    reservoir.offer(["a", "a", "a", "a"], [1, 2, 3, 4])
    assert list(reservoir.rows()) == [1, 2, 3]


def test_the_second_pass_takes_the_same_rows_from_any_order(lookup_task, many_rows):
    profiler = NIWTProfiler(lookup_task.model)
    forward = profiler.profile(batches_of(many_rows, 8), confirm_samples=7)
    backward = profiler.profile(batches_of(many_rows, 8)[::-1], confirm_samples=7)
    assert forward.num_confirmed == 7
    for a, b in zip(forward.layers, backward.layers, strict=True):
        # The mean update is summed in another order.
        assert a.mean_ablation.delta_nll == pytest.approx(b.mean_ablation.delta_nll, rel=1e-5)
        assert a.noise_ablation == b.noise_ablation


def test_clear_effects_are_stable_and_close_ones_are_not():
    generator = np.random.default_rng(0)
    clear = np.stack([generator.normal(5, 1, 40), generator.normal(0, 0.1, 40)])
    assert critical_stability(clear, np.ones(40), seed=0) == 1
    # Ten layers of which any may be the ones that make up 90 %.
    close = generator.normal(0.3, 1, size=(10, 40))
    assert 0 < critical_stability(close, np.ones(40), seed=0) < 0.95


def test_stability_grows_with_the_samples():
    generator = np.random.default_rng(1)
    samples = generator.normal([[1.0], [0.25], [0.0]], 1.0, size=(3, 1600))
    shares = [critical_stability(samples[:, :size], np.ones(size), seed=0) for size in (20, 1600)]
    assert shares[0] < shares[1]
    assert shares[1] > 0.95


@pytest.mark.parametrize("effects", [np.zeros((3, 20)), -np.ones((3, 20)), np.ones((3, 1))])
def test_nothing_critical_is_never_stable(effects):
    assert critical_stability(effects, np.ones(effects.shape[1]), seed=0) == 0


def test_masks_are_the_critical_sets_of_their_rows():
    importance_RL = np.random.default_rng(0).exponential(size=(200, 12)) ** 2
    importance_RL[importance_RL < 0.2] = 0
    importance_RL[3] = 0
    importance_RL[4] = 1
    for importance_L, mask_L in zip(importance_RL, critical_masks(importance_RL), strict=True):
        assert sorted(layer for layer, _ in critical_set(importance_L)) == np.flatnonzero(mask_L).tolist()
        others = np.sort(importance_L[mask_L])[1:].sum()
        if mask_L.any() and mask_L.sum() < 8:
            # One fewer would hold less than 90 %.
            assert others < 0.9 * importance_L.sum() <= importance_L[mask_L].sum() + 1e-12
