"""Whole profiles of language models: measured, merged, consolidated."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus.artifacts import NIWTProfile
from nexus.errors import ProfilingError
from nexus.profiling.activation import ActivationMoments, MeanUpdate
from nexus.profiling.consolidation import BatchMeasurement, consolidate, merge_measurements
from nexus.profiling.niwt import NIWTProfiler, ProfileBatch
from nexus.profiling.spectral import Comoment, intrinsic_dimension


def batch_of(batch, rows: list[int]) -> ProfileBatch:
    return ProfileBatch(
        [f"sample-{row}" for row in rows],
        batch.input_ids_BT[rows],
        batch.attention_mask_BT[rows],
        batch.loss_mask_BT[rows],
    )


def consolidated(measurements, **overrides) -> NIWTProfile:
    arguments = {"teacher": "t", "revision": "r", "seconds": 1.0, "seed": 0} | overrides
    return consolidate(measurements, **arguments)


@pytest.fixture(scope="module")
def measurements(qwen3, text_batch) -> list[BatchMeasurement]:
    profiler = NIWTProfiler(qwen3)
    return [profiler.measure(batch_of(text_batch, rows)) for rows in ([4, 1], [0], [3, 2])]


def test_the_planted_layer_is_found_first(lookup_task):
    batch = batch_of(lookup_task, list(range(8)))
    profile = NIWTProfiler(lookup_task.model).profile([batch])
    assert profile.critical_layers[0].layer == lookup_task.critical_layer
    assert profile.critical_layers[0].weight > 0.9
    drops = [layer.accuracy_drop for layer in profile.layers]
    assert drops[lookup_task.critical_layer] == 1
    assert max(drops[0], drops[2]) < 0.5
    assert profile.baseline.accuracy == 1
    assert profile.baseline.nll < 0.01
    assert profile.num_samples == 8
    assert (profile.metric, profile.strategy, profile.note) == ("delta_nll", "triangular", None)


def test_a_profile_says_what_the_profiler_measured(qwen3, text_batch):
    profiler = NIWTProfiler(qwen3, strategy="prefix")
    batch = batch_of(text_batch, [0, 1, 2, 3, 4])
    profile = profiler.profile([batch])
    arguments = (text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT)
    found = torch.tensor([layer.delta_nll for layer in profile.layers])
    torch.testing.assert_close(found, profiler.delta_nll(*arguments), rtol=1e-6, atol=1e-7)
    assert [layer.layer for layer in profile.layers] == [0, 1, 2]
    assert all(layer.ci95[0] <= layer.delta_nll <= layer.ci95[1] for layer in profile.layers)
    assert (profile.teacher, profile.revision, profile.strategy) == ("Qwen3ForCausalLM", "local", "prefix")
    assert NIWTProfile.model_validate_json(profile.model_dump_json()) == profile
    assert profile.seconds > 0


def test_the_baseline_is_the_clean_models_loss(qwen3, text_batch, measurements):
    profile = consolidated(measurements)
    losses = []
    for row, mask_T in enumerate(text_batch.attention_mask_BT.bool()):
        ids_T = text_batch.input_ids_BT[row, mask_T]
        with torch.no_grad():
            log_probs = qwen3(ids_T[None]).logits[0, :-1].double().log_softmax(-1)
        scored_T = text_batch.loss_mask_BT[row, mask_T][1:].bool()
        losses.append(-log_probs[torch.arange(len(ids_T) - 1), ids_T[1:]][scored_T])
    assert profile.baseline.nll == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_activation_statistics_are_those_of_real_tokens_in_the_clean_model(qwen3, text_batch, measurements):
    """Against `output_hidden_states`, whose last entry is after the final norm and so is no block's output."""
    with torch.no_grad():
        positions_BT = (text_batch.attention_mask_BT.cumsum(-1) - 1).clamp(min=0)
        states = qwen3(
            text_batch.input_ids_BT, text_batch.attention_mask_BT, position_ids=positions_BT, output_hidden_states=True
        ).hidden_states
    profile = consolidated(measurements)
    for layer in (0, 1):
        values = states[layer + 1][text_batch.attention_mask_BT.bool()].double().numpy()
        summary = profile.layers[layer].activation
        # Equal states up to float32 rounding of two batch shapes.
        assert summary.mean_abs == pytest.approx(np.abs(values).mean(), rel=1e-5)
        assert summary.variance == pytest.approx(values.var(0).mean(), rel=1e-5)
        assert summary.abs_max == pytest.approx(np.abs(values).max(), rel=1e-5)
        eigenvalues = np.linalg.eigvalsh(np.cov(values.T, bias=True))[::-1]
        assert profile.layers[layer].intrinsic_dim == intrinsic_dimension(eigenvalues)
        merged = merge_measurements(measurements)
        assert merged.moments_L[layer].count == int(text_batch.attention_mask_BT.sum())


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_leave_the_profile_the_same(qwen3, text_batch, micro_batch_size):
    batch = batch_of(text_batch, [0, 1, 2, 3, 4])
    whole = NIWTProfiler(qwen3).profile([batch])
    split = NIWTProfiler(qwen3, micro_batch_size=micro_batch_size).profile([batch])
    assert [c.layer for c in split.critical_layers] == [c.layer for c in whole.critical_layers]
    for a, b in zip(split.layers, whole.layers, strict=True):
        assert a.delta_nll == pytest.approx(b.delta_nll, abs=1e-5)
        assert a.ci95 == pytest.approx(b.ci95, abs=1e-5)
        assert a.accuracy_drop == b.accuracy_drop
        assert a.activation.kurtosis == pytest.approx(b.activation.kurtosis, rel=1e-4)
        assert a.intrinsic_dim == b.intrinsic_dim


def test_the_order_of_arrival_does_not_change_a_single_byte(measurements):
    profiles = {consolidated(list(order)).model_dump_json() for order in permutations(measurements)}
    assert len(profiles) == 1


def test_repeated_ids_keep_a_fixed_order_too(measurements):
    same = [replace(m, sample_ids=("x",) * len(m.sample_ids)) for m in measurements]
    profiles = {consolidated(list(order)).model_dump_json() for order in permutations(same)}
    assert len(profiles) == 1


def test_measurements_merge_to_samples_sorted_by_id(measurements):
    merged = merge_measurements(measurements)
    assert merged.sample_ids == tuple(f"sample-{row}" for row in range(5))
    assert merged.token_counts_B.tolist() == [4, 1, 3, 2, 3]
    by_id = dict(zip(measurements[0].sample_ids, measurements[0].delta_LB.T, strict=True))
    np.testing.assert_array_equal(merged.delta_LB[:, 1], by_id["sample-1"])
    np.testing.assert_array_equal(merged.delta_LB[:, 4], by_id["sample-4"])
    assert merged.correct_VB.shape == (4, 5)


def test_measurements_pickle(measurements):
    copies = pickle.loads(pickle.dumps(measurements))
    assert consolidated(copies).model_dump_json() == consolidated(measurements).model_dump_json()


def test_a_stream_of_batches_gives_the_profile_of_their_measurements(qwen3, text_batch, measurements):
    batches = (batch_of(text_batch, rows) for rows in ([4, 1], [0], [3, 2]))
    streamed = NIWTProfiler(qwen3).profile(batches)
    together = consolidated(measurements)
    for a, b in zip(streamed.layers, together.layers, strict=True):
        assert (a.delta_nll, a.ci95, a.accuracy_drop) == (b.delta_nll, b.ci95, b.accuracy_drop)
        # Chunks of activations are merged in another order: equal to rounding.
        assert a.activation.kurtosis == pytest.approx(b.activation.kurtosis, rel=1e-10)
        assert a.intrinsic_dim == b.intrinsic_dim


def test_accuracy_counts_samples_whose_every_answer_token_is_right(measurements):
    correct_VB = np.zeros((4, 5), dtype=bool)
    correct_VB[0, :4] = True
    correct_VB[2, :1] = True
    profile = consolidated([replace(merge_measurements(measurements), correct_VB=correct_VB)])
    assert profile.baseline.accuracy == pytest.approx(0.8)
    assert [layer.accuracy_drop for layer in profile.layers] == pytest.approx([0.8, 0.6, 0.8])


def synthetic(delta_LB, metric="delta_nll") -> BatchMeasurement:
    """A measurement of given effects; its activation statistics come from two arbitrary tokens."""
    delta = np.asarray(delta_LB, dtype=np.float64)
    states = torch.eye(2, 3)
    return BatchMeasurement(
        metric=metric,
        strategy="triangular",
        sample_ids=tuple(f"{sample:03}" for sample in range(delta.shape[1])),
        token_counts_B=np.ones(delta.shape[1], dtype=np.int64),
        clean_nll_B=None,
        delta_LB=delta,
        kl_LB=None,
        cosine_drop_LB=None,
        correct_VB=None,
        moments_L=(ActivationMoments.of(states),) * len(delta),
        comoments_L=(Comoment.of(states),) * len(delta),
        updates_L=(MeanUpdate.of(states),) * len(delta),
        probe=None,
    )


def test_importance_is_what_a_layer_is_worth_at_least():
    generator = np.random.default_rng(0)
    certain = generator.normal(1.0, 0.1, size=50)
    uncertain = generator.normal(1.5, 8.0, size=50)
    harmful_to_keep = generator.normal(-2.0, 0.1, size=50)
    profile = consolidated([synthetic([uncertain, certain, harmful_to_keep])])
    assert [critical.layer for critical in profile.critical_layers] == [1]
    assert profile.layers[0].delta_nll > 1
    assert profile.layers[0].ci95[0] < 0
    assert profile.layers[2].ci95[1] < 0
    assert profile.note is None


def test_weights_are_shares_of_the_lower_bounds():
    profile = consolidated([synthetic([np.full(20, 1.0), np.full(20, 3.0), np.full(20, 0.2)])])
    assert [(c.layer, c.weight) for c in profile.critical_layers] == [
        (1, pytest.approx(0.75)),
        (0, pytest.approx(0.25)),
    ]


def test_without_significance_no_layer_is_critical_and_the_note_says_so():
    noise = np.random.default_rng(0).normal(0, 1, size=(3, 40))
    profile = consolidated([synthetic(noise - noise.mean(axis=1, keepdims=True))])
    assert profile.critical_layers == ()
    assert profile.note == "No layer's effect is significant at 95 %: no critical layers. Profile more samples."


def test_one_sample_makes_no_layer_critical():
    profile = consolidated([synthetic([[5.0], [1.0]])], note="Stopped early.", partial=True)
    assert profile.critical_layers == ()
    assert profile.partial
    assert profile.note.startswith("Stopped early. Only 1 samples: intervals are too narrow; 6 is the least")


def test_few_samples_are_said_to_be_few():
    assert "Only 5 samples" in consolidated([synthetic(np.ones((1, 5)))]).note
    assert consolidated([synthetic(np.ones((1, 6)))]).note is None


def test_the_seed_moves_only_the_intervals(measurements):
    first, second = (consolidated(measurements, seed=seed) for seed in (0, 1))
    assert [layer.delta_nll for layer in first.layers] == [layer.delta_nll for layer in second.layers]
    assert [layer.ci95 for layer in first.layers] != [layer.ci95 for layer in second.layers]
    assert consolidated(measurements, seed=0) == first


def test_the_strategy_can_be_named_by_the_caller(measurements):
    assert consolidated(measurements).strategy == "triangular"
    assert consolidated(measurements, strategy="mixed").strategy == "mixed"


def test_the_profile_names_every_strategy_that_was_used_whatever_the_order_of_merging(measurements):
    first, second, *rest = measurements
    second = replace(second, strategy="prefix")
    assert consolidated([first, second, *rest]).strategy == "prefix+triangular"
    once = merge_measurements([merge_measurements([second, *rest]), first])
    assert once.strategy == "prefix+triangular"


def test_nothing_measured_is_no_profile(qwen3):
    with pytest.raises(ProfilingError, match="at least one measured batch"):
        consolidated([])
    with pytest.raises(ProfilingError, match="at least one measured batch"):
        NIWTProfiler(qwen3).profile([])


def test_measurements_of_different_things_do_not_merge(measurements):
    for other in (
        replace(measurements[1], metric="label_nll"),
        replace(measurements[1], correct_VB=None),
        replace(measurements[1], delta_LB=measurements[1].delta_LB[:2]),
    ):
        with pytest.raises(ProfilingError, match="one model by one metric"):
            consolidated([measurements[0], other])


def test_every_row_needs_one_id(qwen3, text_batch):
    batch = replace(batch_of(text_batch, [0, 1]), sample_ids=["a"])
    with pytest.raises(ValueError, match="found 1 ids for 2 rows"):
        NIWTProfiler(qwen3).measure(batch)


def test_the_teacher_is_named_by_where_it_came_from(own_qwen3, text_batch):
    own_qwen3.config._name_or_path = own_qwen3.name_or_path = "lab/teacher"
    own_qwen3.config._commit_hash = "abc123"
    profile = NIWTProfiler(own_qwen3).profile([batch_of(text_batch, [0, 1])])
    assert (profile.teacher, profile.revision) == ("lab/teacher", "abc123")


def test_the_workspace_bounds_the_rows_run_at_once(own_qwen3, text_batch):
    """A vocabulary and answers so large that the batch does not fit are split without being asked."""
    profiler = NIWTProfiler(own_qwen3)
    sizes: list[int] = []
    own_qwen3.model.layers[0].register_forward_hook(lambda _, args, output: sizes.append(len(args[0])))
    own_qwen3.config.vocab_size = 2**23  # only read for the estimate: 4 variants of 4 logits take 512 MiB
    arguments: list[Tensor] = [text_batch.input_ids_BT, text_batch.attention_mask_BT, text_batch.loss_mask_BT]
    split = profiler.delta_nll(*arguments)
    assert sizes == [1, 1, 1, 1, 1]
    own_qwen3.config.vocab_size = 128
    torch.testing.assert_close(split, profiler.delta_nll(*arguments), rtol=0, atol=1e-5)
    assert sizes[5:] == [5]
