"""What NF4 costs the targets of each role, against references written with plain numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nexus.errors import DataError
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import LoadedTower
from nexus.towers.probes import probe_request
from nexus.towers.targets import CodecTargets, DenoisingTargets, SparseTargets, TeacherTargets, TokenTargets
from nexus.towers.tax import target_tax, whole_distributions


def targets(**parts: Any) -> TeacherTargets:
    nothing: dict[str, Any] = {
        "tokens": None, "hidden": {}, "pooled_BE": None, "label_texts": None, "label_logprobs_BC": None
    }  # fmt: skip
    return TeacherTargets("tiny", "f", None, ("a", "b"), **{**nothing, **parts})


def kept(logits_NV: np.ndarray, k: int) -> TokenTargets:
    """The k most probable of each row, and what lies outside them."""
    logprobs_NV = logits_NV - np.log(np.exp(logits_NV).sum(-1, keepdims=True))
    ids_NK = np.argsort(-logprobs_NV, axis=-1)[:, :k]
    inside_NK = np.take_along_axis(logprobs_NV, ids_NK, -1)
    with np.errstate(divide="ignore"):
        tail_N = np.log(
            np.maximum(1 - np.exp(inside_NK).sum(-1), 0) if k < logits_NV.shape[1] else np.zeros(len(ids_NK))
        )
    return TokenTargets(
        np.array([0, len(ids_NK)]), np.zeros(len(ids_NK), np.int32), ids_NK.astype(np.int32), inside_NK.astype(np.float32),
        tail_N.astype(np.float32),
    )  # fmt: skip


def test_tokens_are_weighed_by_their_divergence() -> None:
    random = np.random.default_rng(0)
    p_NV, q_NV = random.normal(size=(2, 5, 7))
    tax = target_tax(targets(tokens=kept(p_NV, 7)), targets(tokens=kept(q_NV, 7)))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (p_NV, q_NV))
    assert (tax.measure, tax.items, tax.mean_cosine) == ("KL of tokens", 5, None)
    assert tax.mean_kl_nats == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-5)
    assert tax.top1_agreement == (p.argmax(-1) == q.argmax(-1)).mean()


def test_ids_that_one_copy_has_not_kept_are_one_class_with_the_rest() -> None:
    # The original keeps 0, 1 and 2 of four ids, NF4 keeps 0, 1 and 3.
    p, q = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.3, 0.3, 0.1, 0.3])
    tax = target_tax(targets(tokens=kept(np.log(p)[None], 3)), targets(tokens=kept(np.log(q)[None], 3)))
    expected = 0.4 * np.log(0.4 / 0.3) + 0.3 * np.log(0.3 / 0.4)
    assert tax.mean_kl_nats == pytest.approx(expected, rel=1e-5)
    assert expected < (p * np.log(p / q)).sum()


def test_an_original_that_nf4_rules_out_is_no_number() -> None:
    one = kept(np.log([[0.5, 0.5]]), 2)
    other = replace(one, logprobs_NK=np.array([[0.0, -np.inf]], np.float32))
    with pytest.raises(DataError, match="found infinity: NF4 rules out"):
        target_tax(targets(tokens=one), targets(tokens=other))


def sparse(rows: list[dict[int, float]]) -> SparseTargets:
    entries = [(i, v) for row in rows for i, v in sorted(row.items())]
    return SparseTargets(
        np.array([0, len(rows)]), np.cumsum([0, *map(len, rows)]), np.array([i for i, _ in entries], np.int32),
        np.array([v for _, v in entries], np.float32), 6,
    )  # fmt: skip


def test_features_are_weighed_by_their_direction_token_by_token() -> None:
    one = sparse([{0: 3.0, 2: 4.0}, {}, {1: 1.0}, {5: 2.0}])
    other = sparse([{0: 3.0, 5: 4.0}, {}, {}, {5: 1.0}])
    tax = target_tax(targets(features={1: one}), targets(features={1: other}))
    assert (tax.measure, tax.items) == ("cosine of features", 4)
    # 9 / 25, two empty tokens that agree, one that is empty in one copy alone, one in the same direction.
    assert tax.mean_cosine == pytest.approx((9 / 25 + 1 + 0 + 1) / 4)
    assert (tax.mean_kl_nats, tax.top1_agreement) == (None, None)


def test_noise_predictions_are_weighed_where_both_copies_look_at_the_same_latents() -> None:
    random = np.random.default_rng(0)
    one_BS, other_BS = random.normal(size=(2, 2, 3, 4)).astype(np.float32)
    denoising = [DenoisingTargets(np.zeros(3, np.float32), one_BS, array, {}) for array in (one_BS, other_BS)]
    tax = target_tax(*(targets(denoising=part) for part in denoising))
    cosines = [
        np.dot(a[0], b[0]) / np.linalg.norm(a[0]) / np.linalg.norm(b[0]) for a, b in zip(one_BS, other_BS, strict=True)
    ]
    assert (tax.measure, tax.items) == ("cosine of noise predictions", 2)
    assert tax.mean_cosine == pytest.approx(np.mean(cosines), rel=1e-5)


def test_reconstructions_are_weighed_row_by_row() -> None:
    def codec(*rows: list[float]) -> TeacherTargets:
        offsets = np.cumsum([0, *map(len, rows)])
        samples_T = np.concatenate([np.array(row, np.float32) for row in rows])
        nothing = np.zeros((0, 1))
        return targets(codec=CodecTargets(np.zeros(3), nothing, nothing, offsets, samples_T, 16000, np.zeros(2)))

    tax = target_tax(codec([1, 0], [0, 1, 0]), codec([1, 0], [0, 1, 1]))
    assert (tax.measure, tax.items) == ("cosine of reconstructions", 2)
    assert tax.mean_cosine == pytest.approx((1 + 1 / np.sqrt(2)) / 2)


def test_targets_of_no_kind_cannot_be_weighed() -> None:
    with pytest.raises(DataError, match="Expected targets that can be weighed of teacher 'tiny'"):
        target_tax(targets(), targets())


def test_a_language_model_and_an_encoder_are_weighed_on_fixed_inputs(
    qwen: LoadedTower, whisper_classifier: LoadedTower
) -> None:
    read, seen = (TeacherEngine(tower, teacher_id="tiny").probe_tax() for tower in (qwen, whisper_classifier))
    assert read is not None
    assert seen is not None
    assert read.mean_kl_nats is not None
    assert 0 < read.mean_kl_nats < 2
    assert (seen.measure, seen.items) == ("cosine of embeddings", 2)
    assert seen.mean_cosine is not None
    assert 0.8 < seen.mean_cosine < 1
    assert whole_distributions(probe_request(qwen), 104).top_k == 104
    assert whole_distributions(probe_request(qwen), None).top_k == probe_request(qwen).top_k
