"""The linear probe: leave-one-out in closed form against refitting, and what it says about ablated encoders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nexus.profiling.niwt import EncoderProfileBatch, NIWTProfiler
from nexus.profiling.probe import RIDGE, ProbeStatistics


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels_B = generator.integers(0, 3, size=30) * 5
    embeddings_BE = generator.normal(size=(30, 12)) + 4 * np.eye(12)[labels_B // 5]
    return embeddings_BE, labels_B


def test_every_row_is_judged_by_a_probe_fitted_to_the_others(data):
    embeddings_BE, labels_B = data
    ablated_BE = embeddings_BE + np.random.default_rng(1).normal(scale=0.5, size=embeddings_BE.shape)
    statistics = ProbeStatistics.of(embeddings_BE, labels_B)
    found_VB = statistics.fit().correct(np.stack([embeddings_BE, ablated_BE]), labels_B)
    x_BE = np.concatenate([embeddings_BE, np.ones((30, 1))], axis=1)
    z_BE = np.concatenate([ablated_BE, np.ones((30, 1))], axis=1)
    ridge = RIDGE * np.trace(x_BE.T @ x_BE) / 13
    for row in range(30):
        others = np.arange(30) != row
        gram = x_BE[others].T @ x_BE[others] + ridge * np.eye(13)
        weights = np.linalg.solve(gram, x_BE[others].T @ (labels_B[others, None] == [0, 5, 10]))
        expected = [5 * int((rows[row] @ weights).argmax()) == labels_B[row] for rows in (x_BE, z_BE)]
        assert found_VB[:, row].tolist() == expected
    assert found_VB[0].mean() > 0.5
    assert not found_VB[1].all()


def test_batches_merge_to_the_probe_of_all_rows(data):
    embeddings_BE, labels_B = data
    order = np.argsort(labels_B)
    parts = [ProbeStatistics.of(embeddings_BE[rows], labels_B[rows]) for rows in np.array_split(order, 4)]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    whole = ProbeStatistics.of(embeddings_BE, labels_B)
    np.testing.assert_allclose(merged.gram_EE, whole.gram_EE, rtol=1e-12)
    assert list(merged.class_sums) == [0, 5, 10]
    np.testing.assert_allclose(merged.fit().weights_EC, whole.fit().weights_EC, rtol=1e-8, atol=1e-12)


def test_one_class_needs_no_probe(data):
    assert ProbeStatistics.of(data[0], np.zeros(30, dtype=np.int64)).fit() is None


def test_labels_without_information_are_not_found(data):
    generator = np.random.default_rng(2)
    embeddings_BE, labels_B = generator.normal(size=(60, 12)), generator.integers(0, 4, size=60)
    found_B = ProbeStatistics.of(embeddings_BE, labels_B).fit().correct(embeddings_BE[None], labels_B)[0]
    # Binomial(60, 1/4): above 28 has probability 1e-4. Judged on the rows that it was fitted to, this probe would be right on most.
    assert found_B.sum() < 28


IDS = [f"row-{row}" for row in range(12)]


@pytest.fixture(scope="module")
def labelled_pixels(siglip):
    """Two kinds of images, told apart by their embeddings."""
    generator = torch.Generator().manual_seed(0)
    labels_B = torch.arange(12) % 2
    pixels = torch.randn(2, 3, 16, 16, generator=generator)[labels_B] + 0.3 * torch.randn(12, 3, 16, 16)
    return {"pixel_values": pixels}, labels_B


def test_an_encoders_profile_has_cosine_drop_and_probe_accuracy(siglip, labelled_pixels, skipping):
    inputs, labels_B = labelled_pixels
    profiler = NIWTProfiler(siglip)
    batches = [
        EncoderProfileBatch(IDS[rows], {k: v[rows] for k, v in inputs.items()}, labels_B[rows])
        for rows in (slice(0, 7), slice(7, 12))
    ]
    profile = profiler.profile(batches)
    assert profile.baseline.probe_accuracy == 1
    assert profile.accuracy_by == "label"
    seen = []
    hook = siglip.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    try:
        for layer in (None, 0, 1, 2):
            with skipping(profiler.stack.blocks, layer), torch.no_grad():
                siglip(**inputs)
    finally:
        hook.remove()
    found = (
        ProbeStatistics.of(seen[0].numpy(), labels_B.numpy()).fit().correct(torch.stack(seen).numpy(), labels_B.numpy())
    )
    for layer in range(3):
        # A cosine of float32 embeddings is exact to a few 1e-7.
        expected = float((1 - F.cosine_similarity(seen[layer + 1], seen[0])).mean())
        assert profile.layers[layer].cosine_drop == pytest.approx(expected, abs=1e-6)
        assert profile.layers[layer].probe_accuracy_drop == pytest.approx(1 - found[layer + 1].mean())
        assert profile.layers[layer].kl_nats > 0
        assert profile.layers[layer].mean_ablation.kl_nats > 0


def test_without_labels_there_is_no_probe(siglip, labelled_pixels):
    profile = NIWTProfiler(siglip).profile([EncoderProfileBatch(IDS, labelled_pixels[0], None)])
    assert profile.baseline.probe_accuracy is None
    assert all(layer.probe_accuracy_drop is None for layer in profile.layers)
    assert all(layer.cosine_drop > 0 for layer in profile.layers)
    assert profile.accuracy_by is None


def test_a_classifier_whose_head_sees_no_pooled_embedding_has_no_cosine(siglip, labelled_pixels):
    class Squared(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, hidden):
            return self.linear(hidden) ** 2

    inputs, labels_B = labelled_pixels
    head = siglip.classifier
    siglip.classifier = Squared(head)
    try:
        profile = NIWTProfiler(siglip).profile([EncoderProfileBatch(IDS, inputs, labels_B)])
    finally:
        siglip.classifier = head
    assert profile.metric == "label_nll"
    assert profile.baseline.probe_accuracy is None
    assert all(layer.cosine_drop is None for layer in profile.layers)
