"""Every architecture of the registry that this version supports, built tiny and taken through the registry's own entry.

Same class, same policy, same path as the real checkpoint: `models/<id>`, `TowerLoader.load`, `TeacherEngine`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers import SiglipConfig, SiglipModel, VideoMAEForPreTraining
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from nexus.errors import TowerLoadError
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import TowerLoader
from nexus.towers.probes import probe_media
from nexus.towers.registry import load_registry
from nexus.towers.targets import ScoreRequest
from nexus.towers.tiny import write_tiny

IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT_TEACHERS = ("glm-4.7-flash", "kimi-k2.5", "qwen2.5-0.5b", "qwen3-omni-30b", "translategemma-4b", "vibevoice-asr")
"""One of each kind: fused experts, latent attention, media towers, windows, seeded noise."""


@pytest.fixture
def load(tmp_path: Path, save: Callable[..., Path]) -> Callable[..., TeacherEngine]:
    """Saves a model where `nexus teachers pull` would have put it and loads it by its id."""

    def through_the_registry(teacher_id: str, model: Any, *companions: Any) -> TeacherEngine:
        (tmp_path / teacher_id).symlink_to(save(model, *companions))
        tower = TowerLoader(load_registry(), models_dir=tmp_path, device="cpu").load(teacher_id)
        return TeacherEngine(tower, teacher_id=teacher_id)

    return through_the_registry


@pytest.mark.parametrize("teacher_id", TEXT_TEACHERS)
def test_language_models_of_the_registry_score_and_answer_a_row_alike_alone_and_with_others(
    tmp_path: Path, text_request: Callable[..., ScoreRequest], teacher_id: str
) -> None:
    write_tiny(teacher_id, tmp_path / teacher_id)
    tower = TowerLoader(load_registry(), models_dir=tmp_path, device="cpu").load(teacher_id)
    engine = TeacherEngine(tower, teacher_id=teacher_id)
    assert engine.num_layers == 3
    assert engine.hidden_size == 64
    request = text_request(("a", "a longer prompt"), ("bc", "d"), layers=(0, 2))
    targets = engine.score(request)
    assert targets.tokens is not None
    assert targets.tokens.logprobs_NK.shape == (5, 8)
    alone = engine.score(text_request(("a longer prompt",), ("d",), layers=(0, 2)))
    assert alone.tokens is not None
    np.testing.assert_allclose(alone.tokens.logprobs_NK, targets.tokens.logprobs_NK[3:], atol=1e-4)
    answers = engine.generate(("a", "a longer prompt"), max_new_tokens=4)
    assert engine.generate(("a longer prompt",), max_new_tokens=4) == answers[1:]


def test_siglip_is_loaded_from_a_checkpoint_with_a_text_tower(
    load: Callable[..., TeacherEngine],
    image_processor: Any,
    png: Callable[[int], bytes],
    media_request: Callable[..., ScoreRequest],
) -> None:
    config = SiglipConfig(
        vision_config={**ENCODER, "image_size": 16, "patch_size": 4},
        text_config={**ENCODER, "vocab_size": 64, "max_position_embeddings": 16, "projection_size": 64, **IDS},
    )
    engine = load("siglip2-so400m", SiglipModel(config), image_processor)
    assert type(engine.tower.model).__name__ == "SiglipVisionModel"
    # Its real rows are 4,304 long, which NF4's blocks do not fit.
    assert engine.tower.coverage.left_float["encoder.layers.0.mlp.fc2"] == "output head or skipped by policy"
    targets = engine.score(media_request((png(0), png(1)), layers=(2,)))
    assert targets.hidden[2].shape == (2, 16, 64)
    assert targets.label_logprobs_BC is None


def test_videomae_is_loaded_from_its_pretraining_checkpoint_and_sees_clips(
    load: Callable[..., TeacherEngine], media_request: Callable[..., ScoreRequest]
) -> None:
    config = transformers.VideoMAEConfig(
        **ENCODER, image_size=32, patch_size=8, num_frames=4, tubelet_size=2, decoder_hidden_size=64,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=64,
    )  # fmt: skip
    crop = {"height": 32, "width": 32}
    processor = VideoMAEImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop)
    engine = load("videomae-large", VideoMAEForPreTraining(config), processor)
    clips = probe_media(engine.tower)
    both = engine.score(media_request(clips, layers=(1,)))
    # Two tubes of two frames, 16 patches each.
    assert both.hidden[1].shape == (2, 32, 64)
    second = engine.score(media_request(clips[1:], layers=(1,)))
    assert both.pooled_BE is not None
    np.testing.assert_allclose(second.pooled_BE, both.pooled_BE[1:], atol=1e-5)
    assert not np.allclose(both.pooled_BE[0], both.pooled_BE[1], atol=1e-3)


def test_speech_models_keep_by_policy_what_four_bits_would_hurt(
    tmp_path: Path, wav: Callable[[int], bytes], media_request: Callable[..., ScoreRequest]
) -> None:
    kept = {"whisper-large-v3-turbo": "model.encoder.layers.0.fc1", "parakeet-tdt-0.6b-v3": "joint.head"}
    for teacher_id, module in kept.items():
        write_tiny(teacher_id, tmp_path / teacher_id)
        tower = TowerLoader(load_registry(), models_dir=tmp_path, device="cpu").load(teacher_id)
        assert tower.coverage.left_float[module] == "output head or skipped by policy"
        targets = TeacherEngine(tower, teacher_id=teacher_id).score(media_request((wav(0), wav(1)), layers=(2,)))
        assert targets.hidden[2].shape[::2] == (2, 64)
        assert targets.pooled_BE is not None
        assert targets.pooled_BE.shape == (2, 64)


@pytest.mark.parametrize("teacher_id", ["step3-vl-10b", "padt-ovd-3b", "qwen3-tts-tokenizer", "gemma-scope-2-27b"])
def test_teachers_that_cannot_be_had_are_refused_and_never_replaced(tmp_path: Path, teacher_id: str) -> None:
    with pytest.raises(TowerLoadError):
        TowerLoader(load_registry(), models_dir=tmp_path).load(teacher_id)
