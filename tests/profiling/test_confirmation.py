"""The second pass: mean and noise ablation, the causal check, and what both passes say about divergence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from nexus.profiling.batches import concatenate_rows, rows_of
from nexus.profiling.consolidation import (
    consolidate,
    merge_confirmations,
    merge_measurements,
    plan_confirmation,
)
from nexus.profiling.layers import find_blocks
from nexus.profiling.niwt import EncoderProfileBatch, NIWTProfiler, ProfileBatch
from nexus.profiling.perturbation import kl_divergence, token_readings
from nexus.profiling.spectral import Subspace

STRATEGIES = ["brute", "prefix", "triangular"]


@pytest.fixture(scope="session")
def profile_batch(text_batch) -> ProfileBatch:
    return ProfileBatch(
        [f"s{row}" for row in range(5)],
        text_batch.input_ids_BT,
        text_batch.attention_mask_BT,
        text_batch.loss_mask_BT,
    )


def replaced(model, blocks, layer, replacement, batch) -> list[torch.Tensor]:
    """Log-probabilities behind each sample's scored tokens: one unpadded sample at a time, a block's output replaced by a hook."""

    def hook(_, args, kwargs, output):
        hidden_in = args[0] if args else kwargs["hidden_states"]
        hidden = output[0] if isinstance(output, tuple) else output
        made = replacement(hidden_in, hidden)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    handle = None if layer is None else blocks[layer].register_forward_hook(hook, with_kwargs=True)
    rows = []
    try:
        for row, mask_T in enumerate(batch.attention_mask_BT.bool()):
            ids_T, scored_T = batch.input_ids_BT[row, mask_T], batch.loss_mask_BT[row, mask_T].bool()
            with torch.no_grad():
                log_probs = model(input_ids=ids_T[None]).logits[0].double().log_softmax(-1)
            rows.append((log_probs[:-1][scored_T[1:]], ids_T[1:][scored_T[1:]]))
    finally:
        if handle is not None:
            handle.remove()
    return rows


def naive_effects(model, blocks, layer, replacement, batch) -> tuple[list[float], list[float]]:
    """(delta NLL, KL) of each sample, summed over its scored tokens."""
    clean = replaced(model, blocks, None, None, batch)
    ablated = replaced(model, blocks, layer, replacement, batch)
    delta, kl = [], []
    for (p, targets), (q, _) in zip(clean, ablated, strict=True):
        index = torch.arange(len(targets))
        delta.append(float((p[index, targets] - q[index, targets]).sum()))
        kl.append(float((p.exp() * (p - q)).sum()))
    return delta, kl


def test_kl_of_skipped_layers_equals_one_sample_at_a_time(causal_lm, profile_batch):
    blocks = find_blocks(causal_lm).blocks
    measurements = [NIWTProfiler(causal_lm, strategy=strategy).measure(profile_batch) for strategy in STRATEGIES]
    for layer in range(3):
        delta, kl = naive_effects(causal_lm, blocks, layer, lambda x, _: x, profile_batch)
        for measurement in measurements:
            # float32 forwards in another order; a KL of a few nats sums 128 terms.
            np.testing.assert_allclose(measurement.delta_LB[layer], delta, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(measurement.kl_LB[layer], kl, rtol=1e-3, atol=1e-4)
            assert measurement.kl_LB.min() > 1e-3


def test_mean_ablation_adds_the_mean_update_of_all_data_to_every_token(causal_lm, profile_batch):
    profiler = NIWTProfiler(causal_lm)
    blocks = profiler.stack.blocks
    merged = merge_measurements([profiler.measure(rows_of(profile_batch, rows)) for rows in (slice(0, 2), slice(2, 5))])
    plan = plan_confirmation(merged, seed=0)
    some = rows_of(profile_batch, slice(0, 3))
    confirmations = [NIWTProfiler(causal_lm, strategy=strategy).confirm(some, plan) for strategy in STRATEGIES]
    for layer in (0, 2):
        updates = []

        def record(hidden_in, hidden_out, updates=updates):
            updates.append((hidden_out - hidden_in).double().flatten(0, -2))
            return hidden_out

        replaced(causal_lm, blocks, layer, record, profile_batch)
        mean_D = torch.cat(updates).mean(dim=0)
        np.testing.assert_allclose(plan.mean_updates_LD[layer], mean_D.numpy(), rtol=1e-4, atol=1e-5)
        delta, kl = naive_effects(causal_lm, blocks, layer, lambda x, _, m=mean_D: x + m.to(x), some)
        for confirmed in confirmations:
            np.testing.assert_allclose(confirmed.mean_ablation.delta_KB[layer], delta, rtol=1e-3, atol=3e-4)
            np.testing.assert_allclose(confirmed.mean_ablation.kl_KB[layer], kl, rtol=1e-3, atol=3e-4)


@pytest.fixture(scope="module")
def plan(qwen3, profile_batch):
    return plan_confirmation(NIWTProfiler(qwen3).measure(profile_batch), seed=3)


def with_subspaces(plan, rank: int):
    """The plan with made-up critical layers 2 and 0, whatever was significant."""
    generator = np.random.default_rng(0)
    bases = [np.linalg.qr(generator.normal(size=(64, 64)))[0][:rank] for _ in range(2)]
    means = [generator.normal(size=64) for _ in range(2)]
    subspaces = tuple(Subspace(mean, basis, np.ones(64)) for mean, basis in zip(means, bases, strict=True))
    return replace(plan, critical_layers=(2, 0), subspaces=subspaces)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_causal_check_projects_a_layers_output_onto_its_components(qwen3, profile_batch, plan, strategy):
    profiler = NIWTProfiler(qwen3, strategy=strategy)
    checked = with_subspaces(plan, rank=40)
    confirmed = profiler.confirm(profile_batch, checked)
    assert confirmed.reconstruction.delta_KB.shape == (2, 5)
    for place, (layer, subspace) in enumerate(zip(checked.critical_layers, checked.subspaces, strict=True)):
        mean_D, basis_KD = torch.tensor(subspace.mean_D).float(), torch.tensor(subspace.basis_KD).float()
        delta, kl = naive_effects(
            qwen3,
            profiler.stack.blocks,
            layer,
            lambda _, out, m=mean_D, v=basis_KD: m + (out - m) @ (v.T @ v),
            profile_batch,
        )
        np.testing.assert_allclose(confirmed.reconstruction.delta_KB[place], delta, rtol=1e-3, atol=3e-4)
        np.testing.assert_allclose(confirmed.reconstruction.kl_KB[place], kl, rtol=1e-3, atol=3e-4)


def test_all_components_reconstruct_without_loss(qwen3, profile_batch, plan):
    confirmed = NIWTProfiler(qwen3).confirm(profile_batch, with_subspaces(plan, rank=64))
    # Rotating there and back in float32 leaves a few 1e-6 of the states.
    assert confirmed.reconstruction.kl_KB.max() < 1e-6
    assert np.abs(confirmed.reconstruction.delta_KB).max() < 1e-3


def test_noise_belongs_to_the_sample_and_not_to_its_batch(qwen3, profile_batch, plan):
    together = NIWTProfiler(qwen3).confirm(profile_batch, plan)
    for profiler in (NIWTProfiler(qwen3, micro_batch_size=2), NIWTProfiler(qwen3, strategy="brute")):
        parts = [profiler.confirm(rows_of(profile_batch, rows), plan) for rows in (slice(3, 5), slice(0, 3))]
        np.testing.assert_allclose(
            merge_confirmations(parts).noise_ablation.delta_KB, together.noise_ablation.delta_KB, rtol=0, atol=1e-4
        )
    other = NIWTProfiler(qwen3).confirm(profile_batch, replace(plan, seed=4))
    assert np.abs(other.noise_ablation.delta_KB - together.noise_ablation.delta_KB).min() > 1e-3


def test_noise_is_as_large_as_the_update_it_replaces(qwen3, profile_batch, plan):
    """Seen through a hook on the next block's input, in the brute strategy, where one row is one sample."""
    seen = []
    blocks = find_blocks(qwen3).blocks
    hook = blocks[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    first = rows_of(profile_batch, slice(0, 1))
    try:
        NIWTProfiler(qwen3, strategy="brute").confirm(first, plan)
        with torch.no_grad():
            embedded = qwen3.model.embed_tokens(first.input_ids_BT)
    finally:
        hook.remove()
    # Runs: clean, mean of block 0, 1, 2, noise of block 0.
    clean_rms, noise_rms = ((seen[run] - embedded).square().mean(-1).sqrt() for run in (0, 4))
    # 64 draws have a root mean square of 1 to about 1/sqrt(128).
    torch.testing.assert_close(noise_rms, clean_rms, rtol=0.4, atol=0)
    assert (noise_rms / clean_rms).mean() == pytest.approx(1, abs=0.1)
    assert not torch.allclose(seen[4], seen[0], rtol=0.1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_block_that_adds_nothing_costs_exactly_nothing_however_it_is_ablated(own_qwen3, profile_batch, strategy):
    with torch.no_grad():
        own_qwen3.model.layers[1].self_attn.o_proj.weight.zero_()
        own_qwen3.model.layers[1].mlp.down_proj.weight.zero_()
    profiler = NIWTProfiler(own_qwen3, strategy=strategy)
    measurement = profiler.measure(profile_batch)
    confirmed = profiler.confirm(profile_batch, plan_confirmation(measurement, seed=0))
    for effects in (confirmed.mean_ablation, confirmed.noise_ablation):
        assert (effects.delta_KB[1] == 0).all()
        assert (effects.kl_KB[1] == 0).all()
        assert (effects.kl_KB[[0, 2]] > 0).all()
    assert (measurement.kl_LB[1] == 0).all()


def test_one_replica_and_three_give_the_same_profile(qwen3, profile_batch):
    """Batches are cut before they are given out: who measures them, and who is ready first, must not show."""
    batches = [rows_of(profile_batch, slice(row, row + 1)) for row in range(5)]

    def profile_of(replicas, order):
        measurements = [replicas[turn % len(replicas)].measure(batches[i]) for turn, i in enumerate(order)]
        plan = plan_confirmation(merge_measurements(measurements), seed=0)
        confirmations = [replicas[turn % len(replicas)].confirm(batches[i], plan) for turn, i in enumerate(order[::-1])]
        return consolidate(
            measurements, teacher="t", revision="r", seconds=1.0, seed=0, confirmations=confirmations
        ).model_dump_json()

    one = profile_of([NIWTProfiler(qwen3)], [0, 1, 2, 3, 4])
    three = profile_of([NIWTProfiler(qwen3) for _ in range(3)], [3, 0, 4, 2, 1])
    assert one == three
    assert '"num_confirmed":5' in one


def test_the_profile_holds_all_four_stages(lookup_task, tmp_path):
    batch = ProfileBatch(
        [f"sample-{row}" for row in range(8)],
        lookup_task.input_ids_BT,
        lookup_task.attention_mask_BT,
        lookup_task.loss_mask_BT,
    )
    path = tmp_path / "lookup.safetensors"
    profiler = NIWTProfiler(lookup_task.model)
    profile = profiler.profile([batch], tensors_path=path)
    critical = profile.critical_layers[0]
    layer = profile.layers[critical.layer]
    assert critical.layer == lookup_task.critical_layer
    assert layer.mean_ablation.ci95[0] > 0.5
    assert layer.noise_ablation.ci95[0] > 0.5
    assert layer.kl_nats > 0.5
    assert layer.accuracy_drop_ci95 == (1.0, 1.0)
    assert (profile.accuracy_by, profile.num_confirmed, profile.tensors) == ("verification", 8, "lookup.safetensors")
    assert profile.critical_stability > 0.95
    # 95 % of the variance carries the lookup: projecting costs a fraction of skipping.
    assert 0 <= critical.reconstruction.kl_nats < 0.2 * layer.kl_nats
    assert layer.effective_rank >= layer.participation_ratio >= 1
    tensors = load_file(path)
    name = f"layers.{critical.layer}."
    with torch.no_grad():
        states = lookup_task.model(lookup_task.input_ids_BT, output_hidden_states=True).hidden_states[
            critical.layer + 1
        ]
    states = states.flatten(0, 1).double().numpy()
    np.testing.assert_allclose(tensors[name + "mean"], states.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tensors[name + "variance"], states.var(0), rtol=1e-4, atol=1e-6)
    basis_KD = tensors[name + "pca_basis"]
    assert len(basis_KD) == layer.intrinsic_dim
    np.testing.assert_allclose(basis_KD @ basis_KD.T, np.eye(len(basis_KD)), atol=1e-5)
    covariance_DD = np.cov(states.T, bias=True)
    held = np.trace(basis_KD @ covariance_DD @ basis_KD.T) / np.trace(covariance_DD)
    assert 0.95 <= held < 1
    mask_D = tensors[name + "importance_mask"]
    assert mask_D.dtype == bool
    assert states.var(0)[mask_D].sum() >= 0.95 * states.var(0).sum()


def test_without_a_second_pass_its_values_are_absent(qwen3, profile_batch, tmp_path):
    profile = NIWTProfiler(qwen3).profile([profile_batch], confirm_samples=0)
    assert profile.num_confirmed == 0
    assert all(layer.mean_ablation is None and layer.noise_ablation is None for layer in profile.layers)
    assert all(critical.reconstruction is None for critical in profile.critical_layers)
    assert profile.layers[0].kl_nats > 0


def test_without_critical_layers_no_tensors_are_written(qwen3, profile_batch, tmp_path):
    path = tmp_path / "none.safetensors"
    profile = NIWTProfiler(qwen3).profile([rows_of(profile_batch, slice(0, 1))], tensors_path=path)
    assert (profile.critical_layers, profile.tensors, profile.critical_stability) == ((), None, None)
    assert not path.exists()


def test_answers_that_were_generated_take_the_place_of_verified_ones(qwen3, profile_batch):
    profiler = NIWTProfiler(qwen3)
    measurement = profiler.measure(profile_batch)
    confirmed = profiler.confirm(profile_batch, plan_confirmation(measurement, seed=0))
    judged_VB = np.zeros((4, 5), dtype=bool)
    judged_VB[0, :4] = judged_VB[1, :1] = True
    profile = consolidate(
        [measurement],
        teacher="t",
        revision="r",
        seconds=1.0,
        seed=0,
        confirmations=[replace(confirmed, generated_correct_VB=judged_VB)],
    )
    assert (profile.accuracy_by, profile.baseline.accuracy) == ("generation", 0.8)
    assert [layer.accuracy_drop for layer in profile.layers] == pytest.approx([0.6, 0.8, 0.8])


def test_capabilities_are_told_apart_where_there_are_several(qwen3, profile_batch):
    profiler = NIWTProfiler(qwen3)
    first, second = (profiler.measure(rows_of(profile_batch, rows)) for rows in (slice(0, 2), slice(2, 5)))
    arguments = {"teacher": "t", "revision": "r", "seconds": 1.0, "seed": 0}
    profile = consolidate([first, second], **arguments, capabilities={"code": [first], "maths": [second]})
    alone = consolidate([second], **arguments)
    assert [e.delta_nll for e in profile.capabilities["maths"]] == [layer.delta_nll for layer in alone.layers]
    assert [e.ci95 for e in profile.capabilities["maths"]] == [layer.ci95 for layer in alone.layers]
    assert consolidate([first], **arguments, capabilities={"code": [first]}).capabilities == {}


def test_kept_rows_of_text_make_one_left_padded_batch(profile_batch):
    rows = [rows_of(profile_batch, slice(row, row + 1)) for row in (2, 0)]
    assert rows[0].input_ids_BT.shape == (1, 4)
    (joined,) = concatenate_rows(rows)
    assert joined.sample_ids == ["s2", "s0"]
    assert torch.equal(joined.input_ids_BT, profile_batch.input_ids_BT[[2, 0]])
    assert torch.equal(joined.attention_mask_BT, profile_batch.attention_mask_BT[[2, 0]])
    assert torch.equal(joined.loss_mask_BT, profile_batch.loss_mask_BT[[2, 0]])


def test_kept_rows_of_an_encoder_are_joined_by_shape():
    def row(name, width, label):
        labels_B = None if label is None else torch.tensor([label])
        return EncoderProfileBatch([name], {"input_features": torch.full((1, 4, width), float(width))}, labels_B)

    joined = concatenate_rows([row("a", 8, 1), row("b", 6, 0), row("c", 8, 2), row("d", 8, None)])
    assert [batch.sample_ids for batch in joined] == [["a", "c"], ["b"], ["d"]]
    assert joined[0].labels_B.tolist() == [1, 2]
    assert joined[0].inputs["input_features"].shape == (2, 4, 8)
    assert joined[2].labels_B is None


def test_kl_of_many_chunks_equals_the_plain_formula(monkeypatch):
    monkeypatch.setattr("nexus.profiling.perturbation._LOGITS_PER_CHUNK", 100)
    generator = torch.Generator().manual_seed(0)
    logits_MV = torch.randn(9, 40, generator=generator)
    logits_MV[:, 7] = -torch.inf
    readings = token_readings(logits_MV, torch.zeros(9, dtype=torch.int64), logits_MV[:3])
    log_probs = logits_MV.double().log_softmax(-1)[:, torch.arange(40) != 7]
    clean = log_probs[:3].repeat(3, 1)
    torch.testing.assert_close(readings[:, 3], (clean.exp() * (clean - log_probs)).sum(-1), rtol=1e-5, atol=1e-7)
    assert readings[:3, 3].tolist() == [0, 0, 0]


def test_kl_is_infinite_where_a_variant_rules_out_what_the_clean_model_says():
    log_p, log_q = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert kl_divergence(log_p, log_q) == torch.inf
    assert kl_divergence(log_q, log_p) == pytest.approx(np.log(2))
