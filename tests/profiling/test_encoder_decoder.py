"""Models that write what they hear: decoder and encoder blocks are profiled apart, exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, GenerationMixin, PreTrainedModel

from nexus.errors import ProfilingError
from nexus.profiling.batches import concatenate_rows, rows_of
from nexus.profiling.consolidation import consolidate, merge_measurements, plan_confirmation, write_tensors
from nexus.profiling.layers import find_blocks, find_stacks
from nexus.profiling.niwt import EncoderProfileBatch, NIWTProfiler, ProfileBatch, SamplingPlan
from nexus.profiling.sampling import is_stable

PATHS = {"decoder": "model.decoder.layers", "encoder": "model.encoder.layers"}
STRATEGIES = ["brute", "prefix", "triangular"]


@pytest.fixture(params=["decoder", "encoder"])
def side(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def profile_batch(speech_batch) -> ProfileBatch:
    return ProfileBatch(
        ["a", "b", "c", "d"],
        speech_batch.input_ids_BT,
        speech_batch.attention_mask_BT,
        speech_batch.loss_mask_BT,
        speech_batch.inputs,
    )


def arguments(batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.input_ids_BT, batch.attention_mask_BT, batch.loss_mask_BT


def naive_sums(model, blocks, skipping, batch) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihoods [L+1, B] and token counts [B]: one unpadded sample and one ablation at a time."""
    sums_VB = torch.zeros(len(blocks) + 1, len(batch.input_ids_BT), dtype=torch.float64)
    for variant in range(len(blocks) + 1):
        for row, mask_T in enumerate(batch.attention_mask_BT.bool()):
            ids_T, scored_T = batch.input_ids_BT[row, mask_T], batch.loss_mask_BT[row, mask_T].bool()
            heard = {name: tensor[row : row + 1] for name, tensor in batch.inputs.items()}
            with skipping(blocks, variant - 1 if variant else None), torch.no_grad():
                log_probs = model(**heard, decoder_input_ids=ids_T[None]).logits[0].double().log_softmax(-1)
            sums_VB[variant, row] = -log_probs[:-1][scored_T[1:], ids_T[1:][scored_T[1:]]].sum()
    return sums_VB, batch.loss_mask_BT.sum(1)


def test_both_sides_are_found_and_named(speech_model):
    stacks = find_stacks(speech_model)
    assert [(stack.side, stack.path, len(stack)) for stack in stacks] == [
        ("decoder", PATHS["decoder"], 2),
        ("encoder", PATHS["encoder"], 3),
    ]
    assert find_blocks(speech_model).path == PATHS["decoder"]
    assert find_blocks(speech_model, PATHS["encoder"]).side == "encoder"


def test_a_model_of_one_side_has_one_list(qwen3, gemma3_multimodal, siglip, whisper):
    found = [
        [(stack.side, stack.path) for stack in find_stacks(m)] for m in (qwen3, gemma3_multimodal, siglip, whisper)
    ]
    assert found == [
        [("decoder", "model.layers")],
        [("decoder", "model.language_model.layers")],
        [("encoder", "vision_model.encoder.layers")],
        [("encoder", "encoder.layers")],
    ]
    tower = find_blocks(gemma3_multimodal, "model.vision_tower.encoder.layers")
    assert tower.side == "encoder"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_delta_nll_equals_one_unpadded_sample_and_ablation_at_a_time(
    speech_model, speech_batch, skipping, side, strategy
):
    profiler = NIWTProfiler(speech_model, layers=PATHS[side], strategy=strategy)
    sums_VB, counts_B = naive_sums(speech_model, profiler.stack.blocks, skipping, speech_batch)
    delta_LB = sums_VB[1:] - sums_VB[:1]
    found = profiler.delta_nll(*arguments(speech_batch), inputs=speech_batch.inputs)
    # float32 forwards in another order: a few 1e-6.
    torch.testing.assert_close(found.double(), delta_LB.sum(1) / counts_B.sum(), rtol=1e-5, atol=1e-5)
    per_sample = profiler.delta_nll_per_sample(*arguments(speech_batch), inputs=speech_batch.inputs)
    torch.testing.assert_close(per_sample.double(), delta_LB / counts_B, rtol=1e-5, atol=2e-5)
    assert per_sample.abs().min() > 1e-3


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_change_nothing(speech_model, speech_batch, side, size):
    whole, split = (
        NIWTProfiler(speech_model, layers=PATHS[side], micro_batch_size=micro).delta_nll(
            *arguments(speech_batch), inputs=speech_batch.inputs
        )
        for micro in (None, size)
    )
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", ["brute", "stacked"])
@pytest.mark.parametrize("stops", [None, "some"])
def test_tokens_equal_real_generation_of_one_ablation_and_sample_at_a_time(
    speech_model, speech_batch, skipping, side, strategy, stops
):
    profiler = NIWTProfiler(speech_model, layers=PATHS[side], strategy=strategy)
    ids_BT, mask_BT, _ = arguments(speech_batch)
    config = speech_model.generation_config
    config.eos_token_id = None
    try:
        if stops is not None:
            # Rows stop at different steps: tokens that are seen to be generated, but not the most frequent one.
            ids, counts = profiler.ablated_generations(ids_BT, mask_BT, 8, inputs=speech_batch.inputs).unique(
                return_counts=True
            )
            config.eos_token_id = ids[counts.argsort(descending=True)][1:5].tolist()
        found_VBA = profiler.ablated_generations(ids_BT, mask_BT, 8, inputs=speech_batch.inputs)
        expected_VBA = torch.zeros_like(found_VBA)
        for variant in range(len(profiler.stack) + 1):
            for row in range(4):
                prompt = ids_BT[row, mask_BT[row].bool()][None]
                heard = {name: tensor[row : row + 1] for name, tensor in speech_batch.inputs.items()}
                with skipping(profiler.stack.blocks, variant - 1 if variant else None):
                    # Not Whisper's own generate, which cuts recordings and drops its prompt; it calls this one.
                    output = GenerationMixin.generate(
                        speech_model,
                        **heard,
                        decoder_input_ids=prompt,
                        max_new_tokens=8,
                        do_sample=False,
                        pad_token_id=0,
                    )
                generated = output[0, prompt.shape[1] :]
                expected_VBA[variant, row, : len(generated)] = generated
    finally:
        config.eos_token_id = 2
    assert torch.equal(found_VBA, expected_VBA)
    assert len(found_VBA.flatten(1).unique(dim=0)) == len(profiler.stack) + 1


def test_decoding_ends_with_the_last_row(speech_model, speech_batch, side, monkeypatch):
    prompts = arguments(speech_batch)[:2]
    profiler = NIWTProfiler(speech_model, layers=PATHS[side])
    first_VB = profiler.ablated_generations(*prompts, 1, inputs=speech_batch.inputs)[..., 0]
    monkeypatch.setattr(speech_model.generation_config, "eos_token_id", first_VB.unique().tolist())
    tokens_VBA = profiler.ablated_generations(*prompts, 5, inputs=speech_batch.inputs)
    assert torch.equal(tokens_VBA[..., 0], first_VB)
    assert (tokens_VBA[..., 1:] == 0).all()


def test_either_side_can_be_in_front_where_there_are_two(speech_model, profile_batch, qwen3):
    measured = NIWTProfiler.of_both_sides(speech_model, first="encoder").measure(profile_batch)
    assert (measured.side, measured.other_side.side) == ("encoder", "decoder")
    with pytest.raises(ProfilingError, match="in a decoder of Qwen3ForCausalLM, found one side"):
        NIWTProfiler.of_both_sides(qwen3, first="encoder")


def test_what_is_heard_is_encoded_and_projected_once_for_all_ablations_of_the_decoder(speech_model, speech_batch):
    calls = {"encoder": 0, "keys": 0}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
        for name, module in (
            ("encoder", speech_model.model.encoder),
            ("keys", speech_model.model.decoder.layers[1].encoder_attn.k_proj),
        )
    ]
    try:
        for strategy in STRATEGIES:
            profiler = NIWTProfiler(speech_model, layers=PATHS["decoder"], strategy=strategy)
            profiler.delta_nll(*arguments(speech_batch), inputs=speech_batch.inputs)
            profiler.ablated_generations(*arguments(speech_batch)[:2], 4, inputs=speech_batch.inputs)
            assert calls == {"encoder": 2, "keys": 2}
            calls |= {"encoder": 0, "keys": 0}
    finally:
        for hook in hooks:
            hook.remove()


def test_a_profile_tells_of_both_sides_apart(speech_model, profile_batch, tmp_path):
    path = tmp_path / "speech.safetensors"
    profile = NIWTProfiler(speech_model).profile([profile_batch], tensors_path=path)
    assert (profile.side, profile.path, profile.num_layers) == ("decoder", PATHS["decoder"], 2)
    assert (profile.other_side.side, profile.other_side.path, profile.other_side.num_layers) == (
        "encoder",
        PATHS["encoder"],
        3,
    )
    assert profile.other_side.baseline == profile.baseline
    for part in (profile, profile.other_side):
        profiler = NIWTProfiler(speech_model, layers=part.path)
        expected = profiler.delta_nll(*arguments(profile_batch), inputs=profile_batch.inputs)
        found = torch.tensor([layer.delta_nll for layer in part.layers])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert (part.num_samples, part.num_confirmed, part.metric) == (4, 4, "delta_nll")
        assert all(layer.kl_nats > 0 and layer.noise_ablation.kl_nats > 0 for layer in part.layers)
        alone = profiler.profile([profile_batch])
        assert [layer.ci95 for layer in alone.layers] == [layer.ci95 for layer in part.layers]
        assert alone.other_side is None
    assert type(profile).model_validate_json(profile.model_dump_json()) == profile


def test_statistics_are_those_of_what_each_side_sees(speech_model, profile_batch):
    measurement = NIWTProfiler(speech_model).measure(profile_batch)
    assert measurement.moments_L[0].count == int(profile_batch.attention_mask_BT.sum())
    assert measurement.other_side.moments_L[0].count == 4 * 20
    with torch.no_grad():
        states = speech_model.model.encoder(**profile_batch.inputs, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(
        measurement.other_side.moments_L[0].mean_D,
        states[1].flatten(0, 1).double().mean(0).numpy(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_batches_merge_on_both_sides(speech_model, profile_batch):
    profiler = NIWTProfiler(speech_model)
    whole = profiler.measure(profile_batch)
    parts = [profiler.measure(rows_of(profile_batch, rows)) for rows in (slice(2, 4), slice(0, 2))]
    merged = merge_measurements(parts)
    for found, expected in ((merged, whole), (merged.other_side, whole.other_side)):
        np.testing.assert_allclose(found.delta_LB, expected.delta_LB, rtol=0, atol=2e-5)
        assert (found.sample_ids, found.path) == (expected.sample_ids, expected.path)
    with pytest.raises(ProfilingError, match="one model by one metric"):
        merge_measurements([parts[0], parts[1].other_side])


def significant(measurement, num_samples: int = 20):
    """The measurement with so many samples of certain effects."""
    delta_LB = np.ones((len(measurement.delta_LB), num_samples)) * np.arange(1, len(measurement.delta_LB) + 1)[:, None]
    return replace(
        measurement,
        sample_ids=tuple(f"{sample:02}" for sample in range(num_samples)),
        token_counts_B=np.ones(num_samples, dtype=np.int64),
        clean_nll_B=np.ones(num_samples),
        delta_LB=delta_LB,
        kl_LB=delta_LB,
        correct_VB=None,
        other_side=None if measurement.other_side is None else significant(measurement.other_side, num_samples),
    )


def test_both_sides_have_critical_layers_tensors_and_capabilities(speech_model, profile_batch, tmp_path):
    measurement = significant(NIWTProfiler(speech_model).measure(profile_batch))
    plan = plan_confirmation(measurement, seed=0)
    assert plan.critical_layers == (1, 0)
    assert plan.other_side.critical_layers == (2, 1, 0)
    write_tensors(tmp_path / "t.safetensors", measurement, plan)
    names = {name.rsplit(".", 1)[0] for name in load_file(tmp_path / "t.safetensors")}
    assert names == {"layers.0", "layers.1", "other_side.layers.0", "other_side.layers.1", "other_side.layers.2"}
    profile = consolidate(
        [measurement],
        teacher="t",
        revision="r",
        seconds=1.0,
        seed=0,
        capabilities={"asr": [measurement], "translation": [measurement]},
    )
    assert [c.layer for c in profile.other_side.critical_layers] == [2, 1, 0]
    assert set(profile.other_side.capabilities) == {"asr", "translation"}


def test_sampling_goes_on_until_both_sides_are_stable(speech_model, profile_batch):
    measurement = significant(NIWTProfiler(speech_model).measure(profile_batch))
    assert is_stable(measurement, seed=0)
    noise = np.random.default_rng(0).normal(0, 1, size=(3, 20))
    unsure = replace(
        measurement, other_side=replace(measurement.other_side, delta_LB=noise - noise.mean(1, keepdims=True))
    )
    assert not is_stable(unsure, seed=0)
    plan = SamplingPlan(max_samples=4, min_samples=2)
    assert NIWTProfiler(speech_model).profile([profile_batch], sampling=plan).num_samples == 4


def test_without_text_the_encoder_is_measured_alone(speech_model, speech_batch):
    batch = EncoderProfileBatch(["a", "b", "c", "d"], speech_batch.inputs, None)
    profile = NIWTProfiler(speech_model).profile([batch])
    assert (profile.metric, profile.side, profile.path, profile.other_side) == (
        "cosine_drop", "encoder", PATHS["encoder"], None,
    )  # fmt: skip
    encoder = speech_model.get_encoder()
    expected = NIWTProfiler(encoder).profile([batch])
    assert [layer.delta_nll for layer in profile.layers] == [layer.delta_nll for layer in expected.layers]
    with torch.no_grad():
        clean_BD = encoder(**speech_batch.inputs).last_hidden_state.mean(1)
        block = encoder.layers[1]
        hook = block.register_forward_hook(lambda _, args, output: args[0])
        ablated_BD = encoder(**speech_batch.inputs).last_hidden_state.mean(1)
        hook.remove()
    drop_B = 1 - F.cosine_similarity(clean_BD.double(), ablated_BD.double())
    assert profile.layers[1].delta_nll == pytest.approx(float(drop_B.mean()), abs=1e-6)


def test_kept_rows_are_joined_with_what_is_heard(profile_batch):
    rows = [rows_of(profile_batch, slice(row, row + 1)) for row in (2, 0)]
    (joined,) = concatenate_rows(rows)
    assert joined.sample_ids == ["c", "a"]
    assert torch.equal(joined.input_ids_BT, profile_batch.input_ids_BT[[2, 0]])
    assert torch.equal(joined.inputs["input_features"], profile_batch.inputs["input_features"][[2, 0]])
    shorter = replace(rows[0], inputs={"input_features": torch.zeros(1, 16, 20)})
    assert len(concatenate_rows([rows[0], shorter])) == 2


@pytest.fixture(scope="module")
def text_to_text() -> PreTrainedModel:
    """Reads padded text, and counts the positions of what it writes from the first column."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=128,
        d_model=64,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=32,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        forced_eos_token_id=None,
        tie_word_embeddings=False,
    )
    return BartForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def read_batch(speech_batch):
    ids_BS = torch.randint(4, 100, (4, 7), generator=torch.Generator().manual_seed(1))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, 4:] = mask_BS[3, 6:] = 0
    return replace(speech_batch, inputs={"input_ids": ids_BS, "attention_mask": mask_BS})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padded_text_is_read_without_its_padding(text_to_text, read_batch, skipping, side, strategy):
    profiler = NIWTProfiler(text_to_text, layers=PATHS[side], strategy=strategy, micro_batch_size=3)
    sums_VB, counts_B = naive_sums(text_to_text, profiler.stack.blocks, skipping, read_batch)
    found = profiler.delta_nll_per_sample(*arguments(read_batch), inputs=read_batch.inputs)
    torch.testing.assert_close(found.double(), (sums_VB[1:] - sums_VB[:1]) / counts_B, rtol=1e-5, atol=2e-5)
    statistics = profiler.measure(ProfileBatch(list("abcd"), *arguments(read_batch), read_batch.inputs)).moments_L[0]
    seen_BT = read_batch.attention_mask_BT if side == "decoder" else read_batch.inputs["attention_mask"]
    assert statistics.count == int(seen_BT.sum())


def test_padded_text_is_read_without_its_padding_while_writing(text_to_text, read_batch, side):
    prompts = (torch.full((4, 1), 3), torch.ones(4, 1, dtype=torch.int64))
    tokens = [
        NIWTProfiler(text_to_text, layers=PATHS[side], strategy=strategy).ablated_generations(
            *prompts, 6, inputs=read_batch.inputs
        )
        for strategy in ("brute", "stacked")
    ]
    assert torch.equal(*tokens)
    for row in range(4):
        heard = {name: tensor[row : row + 1] for name, tensor in read_batch.inputs.items()}
        output = GenerationMixin.generate(
            text_to_text, **heard, decoder_input_ids=prompts[0][:1], max_new_tokens=6, do_sample=False
        )
        assert tokens[0][0, row].tolist() == [*output[0, 1:].tolist(), *[0] * 6][:6]


def test_prompts_whose_positions_would_be_miscounted_are_refused(text_to_text, read_batch):
    with pytest.raises(ValueError, match="without padding on the left, because BartForConditionalGeneration counts"):
        NIWTProfiler(text_to_text).ablated_generations(*arguments(read_batch)[:2], 3, inputs=read_batch.inputs)


def test_what_the_encoder_reads_must_be_given_row_by_row(speech_model, speech_batch, qwen3):
    profiler = NIWTProfiler(speech_model)
    with pytest.raises(ValueError, match="what the encoder of WhisperForConditionalGeneration reads"):
        profiler.delta_nll(*arguments(speech_batch))
    with pytest.raises(ValueError, match=r"batch of 4 rows in front, found shapes \{'input_features': \(3, 16, 40\)\}"):
        profiler.delta_nll(
            *arguments(speech_batch), inputs={"input_features": speech_batch.inputs["input_features"][:3]}
        )
    with pytest.raises(ProfilingError, match="text alone to generate from with Qwen3ForCausalLM, found input_features"):
        NIWTProfiler(qwen3).ablated_generations(*arguments(speech_batch)[:2], 3, inputs=speech_batch.inputs)


def test_a_cross_attention_that_cannot_be_shared_is_refused(speech_model, speech_batch):
    class Forgetful(type(speech_model)):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.past_key_values = None
            return output

    model = Forgetful(speech_model.config).eval()
    with pytest.raises(
        ProfilingError, match="Forgetful to cache cross-attention in an EncoderDecoderCache, found NoneType"
    ):
        NIWTProfiler(model).delta_nll(*arguments(speech_batch), inputs=speech_batch.inputs)
