"""Profiles of encoders: label likelihood with a classification head, cosine drop without one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from nexus.errors import ProfilingError
from nexus.profiling.layers import find_blocks
from nexus.profiling.niwt import EncoderProfileBatch, NIWTProfiler

IDS = [f"row-{row}" for row in range(6)]


@pytest.fixture(scope="session")
def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="session")
def mels() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(6, 16, 40, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(params=["siglip", "whisper", "whisper_weighted"])
def classifier(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    inputs = "pixels" if request.param == "siglip" else "mels"
    return request.getfixturevalue(request.param), request.getfixturevalue(inputs)


LABELS_B = torch.tensor([0, 1, 2, 3, 4, 0])


def naive_log_probs(model, blocks, skipping, inputs) -> torch.Tensor:
    """[L+1, B, C]: one row and one ablation at a time."""
    rows = []
    for variant in range(len(blocks) + 1):
        with skipping(blocks, variant - 1 if variant else None), torch.no_grad():
            logits = [model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits for row in range(6)]
        rows.append(torch.cat(logits).double().log_softmax(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("strategy", ["auto", "brute", "prefix", "triangular"])
def test_label_nll_equals_one_row_and_ablation_at_a_time(classifier, skipping, strategy):
    model, inputs = classifier
    profiler = NIWTProfiler(model, strategy=strategy)
    log_probs_VBC = naive_log_probs(model, profiler.stack.blocks, skipping, inputs)
    measurement = profiler.measure(EncoderProfileBatch(IDS, inputs, LABELS_B))
    nll_VB = -log_probs_VBC[:, torch.arange(6), LABELS_B].numpy()
    np.testing.assert_allclose(measurement.clean_nll_B, nll_VB[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(measurement.delta_LB, nll_VB[1:] - nll_VB[:1], rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(measurement.correct_VB, (log_probs_VBC.argmax(-1) == LABELS_B).numpy())
    assert measurement.metric == "label_nll"
    assert measurement.strategy == ("brute" if strategy == "brute" else "prefix")
    assert measurement.token_counts_B.tolist() == [1] * 6
    assert np.abs(measurement.delta_LB).max() > 1e-3


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_micro_batches_leave_the_measurement_the_same(classifier, micro_batch_size):
    model, inputs = classifier
    batch = EncoderProfileBatch(IDS, inputs, LABELS_B)
    whole = NIWTProfiler(model).measure(batch)
    split = NIWTProfiler(model, micro_batch_size=micro_batch_size).measure(batch)
    np.testing.assert_allclose(split.delta_LB, whole.delta_LB, rtol=0, atol=1e-5)
    assert split.moments_L[0].count == whole.moments_L[0].count
    np.testing.assert_allclose(split.comoments_L[1].comoment_DD, whole.comoments_L[1].comoment_DD, rtol=1e-3, atol=1e-4)


def test_without_labels_a_classifier_is_held_to_its_own_decisions(siglip, pixels):
    profiler = NIWTProfiler(siglip)
    own_labels_B = siglip(**pixels).logits.argmax(-1)
    unlabelled = profiler.measure(EncoderProfileBatch(IDS, pixels, None))
    labelled = profiler.measure(EncoderProfileBatch(IDS, pixels, own_labels_B))
    np.testing.assert_array_equal(unlabelled.delta_LB, labelled.delta_LB)
    assert unlabelled.correct_VB is None
    assert labelled.correct_VB[0].all()
    profile = profiler.profile([EncoderProfileBatch(IDS, pixels, None)])
    assert (profile.metric, profile.baseline.accuracy) == ("label_nll", None)
    assert all(layer.accuracy_drop is None for layer in profile.layers)
    assert profile.baseline.nll > 0


def test_the_profile_of_a_classifier_has_its_accuracy(siglip, pixels):
    labels_B = siglip(**pixels).logits.argmax(-1)
    labels_B[0] = (labels_B[0] + 1) % 5
    profile = NIWTProfiler(siglip).profile([EncoderProfileBatch(IDS, pixels, labels_B)])
    assert profile.baseline.accuracy == pytest.approx(5 / 6)
    assert profile.num_layers == 3


def naive_cosine_drops(model, blocks, skipping, pool) -> np.ndarray:
    embeddings = []
    for variant in range(len(blocks) + 1):
        with skipping(blocks, variant - 1 if variant else None), torch.no_grad():
            embeddings.append(pool().double())
    return 1 - torch.stack([F.cosine_similarity(e, embeddings[0]) for e in embeddings[1:]]).numpy()


@pytest.fixture(scope="module")
def vision_encoder() -> PreTrainedModel:
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    return SiglipVisionModel(config).eval()


@pytest.mark.parametrize("strategy", ["brute", "auto"])
def test_cosine_drop_of_the_models_own_pooled_embedding(vision_encoder, pixels, skipping, strategy):
    profiler = NIWTProfiler(vision_encoder, strategy=strategy)
    expected = naive_cosine_drops(
        vision_encoder, profiler.stack.blocks, skipping, lambda: vision_encoder(**pixels).pooler_output
    )
    profile = profiler.profile([EncoderProfileBatch(IDS, pixels, None)])
    found = [layer.delta_nll for layer in profile.layers]
    # A cosine of float32 embeddings is exact to a few 1e-7.
    assert found == pytest.approx(expected.mean(axis=1), abs=1e-6)
    assert profile.metric == "cosine_drop"
    assert (profile.baseline.nll, profile.baseline.accuracy) == (None, None)


def test_a_block_without_effect_drops_the_cosine_by_exactly_zero(vision_encoder, pixels):
    model = copy.deepcopy(vision_encoder)
    block = find_blocks(model).blocks[1]
    with torch.no_grad():
        for linear in (block.self_attn.out_proj, block.mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
    delta_LB = NIWTProfiler(model).measure(EncoderProfileBatch(IDS, pixels, None)).delta_LB
    assert (delta_LB[1] == 0).all()
    assert (delta_LB[[0, 2]] > 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_without_a_pooler_positions_are_averaged(mels, skipping, masked):
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=20,
    )
    model = WhisperEncoder(config).eval()
    # A mask over the 40 frames of the spectrogram is not one over the encoder's 20 positions.
    inputs = mels | ({"attention_mask": torch.ones(6, 40, dtype=torch.int64)} if masked else {})
    profiler = NIWTProfiler(model)
    expected = naive_cosine_drops(
        model, profiler.stack.blocks, skipping, lambda: model(**mels).last_hidden_state.mean(dim=1)
    )
    measurement = profiler.measure(EncoderProfileBatch(IDS, inputs, None))
    np.testing.assert_allclose(measurement.delta_LB, expected, atol=1e-6)
    assert measurement.moments_L[0].count == 6 * 20


def test_padding_is_left_out_of_the_average_and_of_the_statistics(skipping):
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=64, dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=16)
    model = DistilBertModel(config).eval()
    ids_BT = torch.randint(3, 60, (6, 8), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, 5:] = mask_BT[3, 2:] = 0
    profiler = NIWTProfiler(model)

    def pooled_without_padding() -> torch.Tensor:
        rows = [model(ids_BT[row : row + 1, : int(mask_BT[row].sum())]).last_hidden_state.mean(1) for row in range(6)]
        return torch.cat(rows)

    expected = naive_cosine_drops(model, profiler.stack.blocks, skipping, pooled_without_padding)
    batch = EncoderProfileBatch(IDS, {"input_ids": ids_BT, "attention_mask": mask_BT}, None)
    measurement = profiler.measure(batch)
    np.testing.assert_allclose(measurement.delta_LB, expected, atol=1e-6)
    assert measurement.moments_L[0].count == int(mask_BT.sum())


def test_an_encoder_whose_ablations_change_nothing_is_refused(vision_encoder, pixels):
    class Deaf(SiglipVisionModel):
        def forward(self, pixel_values, **kwargs):
            output = super().forward(pixel_values, **kwargs)
            output.pooler_output = torch.ones_like(output.pooler_output)
            return output

    model = Deaf(vision_encoder.config).eval()
    with pytest.raises(ProfilingError, match=r"encoder\.layers' to change the model's output"):
        NIWTProfiler(model).profile([EncoderProfileBatch(IDS, pixels, None)])


def test_every_row_needs_one_id(siglip, pixels):
    with pytest.raises(ValueError, match="found 2 ids for 6 rows"):
        NIWTProfiler(siglip).measure(EncoderProfileBatch(["a", "b"], pixels, None))
