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
from transformers import ParakeetFeatureExtractor, SiglipConfig, SiglipModel, VideoMAEForPreTraining
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from nexus.errors import ConfigError, TowerLoadError
from nexus.towers.engine import TeacherEngine
from nexus.towers.loader import TowerLoader
from nexus.towers.registry import load_registry
from nexus.towers.targets import ScoreRequest

IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
FREE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    **IDS,
}
TEXT = {**FREE, "head_dim": 16}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
AUDIO = {
    "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128, "d_model": 64,
    "max_source_positions": 64, "n_window": 20, "output_dim": 64,
}  # fmt: skip
PATCHES = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 8,
    "out_hidden_size": 64,
}
TURNS = {"audio_token_id": 500, "image_token_id": 501, "video_token_id": 502}


def build(name: str, **config: Any) -> Any:
    """A tiny model of a class of transformers."""
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**config))


def qwen3() -> Any:
    return build("Qwen3ForCausalLM", **TEXT)


def qwen2() -> Any:
    return build("Qwen2ForCausalLM", **FREE)


def gemma() -> Any:
    return build(
        "Gemma3ForConditionalGeneration",
        text_config={**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 16},
        vision_config={**ENCODER, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8, "vision_use_head": False},
        mm_tokens_per_image=4, image_token_id=500, boi_token_index=501, eoi_token_index=502,
    )  # fmt: skip


def vibevoice() -> Any:
    encoder = {"num_filters": 8, "downsampling_ratios": [2, 4], "depths": [1, 1, 1]}
    model_type = "vibevoice_acoustic_tokenizer_encoder"
    return build(
        "VibeVoiceAsrForConditionalGeneration",
        acoustic_tokenizer_encoder_config={"model_type": model_type, "hidden_size": 64, **encoder},
        semantic_tokenizer_encoder_config={"model_type": model_type, "hidden_size": 64, **encoder},
        text_config={**FREE, "model_type": "qwen2"},
        audio_token_id=500, audio_bos_token_id=501, audio_eos_token_id=502, acoustic_tokenizer_chunk_size=64,
    )  # fmt: skip


def glm() -> Any:
    return build("Glm4MoeLiteForCausalLM", **{**FREE, **LATENT})


def kimi() -> Any:
    return build(
        "Kimi_K25ForConditionalGeneration",
        text_config={"model_type": "deepseek_v3", **FREE, **LATENT},
        vision_config={
            **ENCODER, "num_hidden_layers": 2, "patch_size": 8, "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4
        },
        projection_hidden_size=64, image_token_id=500, video_token_id=501, vision_start_token_id=502, vision_end_token_id=503,
        tie_word_embeddings=False,
    )  # fmt: skip


def omni() -> Any:
    return build(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        text_config={
            **TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "rope_parameters": {**ROPE, "mrope_interleaved": True},
        },
        vision_config={**PATCHES, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        audio_config={
            **AUDIO, "n_window": 50, "n_window_infer": 100, "conv_chunksize": 50, "downsample_hidden_size": 16
        },
        **TURNS,
    )  # fmt: skip


# Loader tests have the classification models; these are the registry's own rows.
TEXT_TEACHERS = {
    "agentcpm-explore": qwen3,
    "qwen2.5-0.5b": qwen2,
    "qwen2.5-coder-7b": qwen2,
    "translategemma-4b": gemma,
    "vibevoice-asr": vibevoice,
}
TEACHERS_WITH_EXPERTS = {"glm-4.7-flash": glm, "kimi-k2.5": kimi, "qwen3-omni-30b": omni}


@pytest.fixture
def load(tmp_path: Path, save: Callable[..., Path]) -> Callable[..., TeacherEngine]:
    """Saves a model where `nexus teachers pull` would have put it and loads it by its id."""

    def through_the_registry(teacher_id: str, model: Any, *companions: Any) -> TeacherEngine:
        (tmp_path / teacher_id).symlink_to(save(model, *companions))
        tower = TowerLoader(load_registry(), models_dir=tmp_path, device="cpu").load(teacher_id)
        return TeacherEngine(tower, teacher_id=teacher_id)

    return through_the_registry


@pytest.mark.parametrize("teacher_id", sorted(TEXT_TEACHERS))
def test_language_models_of_the_registry_score_and_answer(
    load: Callable[..., TeacherEngine],
    make_tokenizer: Callable[..., Any],
    text_request: Callable[..., ScoreRequest],
    teacher_id: str,
) -> None:
    engine = load(teacher_id, TEXT_TEACHERS[teacher_id](), make_tokenizer())
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


@pytest.mark.parametrize("teacher_id", sorted(TEACHERS_WITH_EXPERTS))
def test_experts_that_nf4_cannot_reach_are_refused_and_never_kept_in_float_unseen(
    load: Callable[..., TeacherEngine], make_tokenizer: Callable[..., Any], teacher_id: str
) -> None:
    with pytest.raises(TowerLoadError, match="reach the experts"):
        load(teacher_id, TEACHERS_WITH_EXPERTS[teacher_id](), make_tokenizer())


def test_an_omni_checkpoint_in_gptq_is_refused_and_not_filled_with_random_weights(
    load: Callable[..., TeacherEngine], make_tokenizer: Callable[..., Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    import json

    model = build(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        text_config={**FREE, "rope_parameters": ROPE},
        vision_config={
            **PATCHES,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        audio_config=AUDIO,
    )
    folder = save(model, make_tokenizer())
    config = json.loads((folder / "config.json").read_text())
    whole = {
        "model_type": "qwen2_5_omni",
        "thinker_config": config,
        "quantization_config": {"quant_method": "gptq", "bits": 4},
    }
    (folder / "config.json").write_text(json.dumps(whole))
    (tmp_path / "qwen2.5-omni-7b").symlink_to(folder)
    with pytest.raises(TowerLoadError, match="already quantised by gptq"):
        TowerLoader(load_registry(), models_dir=tmp_path).load("qwen2.5-omni-7b")


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


def test_videomae_is_loaded_from_its_pretraining_checkpoint_and_says_that_it_takes_video(
    load: Callable[..., TeacherEngine], png: Callable[[int], bytes], media_request: Callable[..., ScoreRequest]
) -> None:
    config = transformers.VideoMAEConfig(
        **ENCODER, image_size=32, patch_size=8, num_frames=4, tubelet_size=2, decoder_hidden_size=64,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=64,
    )  # fmt: skip
    engine = load("videomae-large", VideoMAEForPreTraining(config), VideoMAEImageProcessorPil())
    assert (engine.num_layers, engine.hidden_size) == (3, 64)
    with pytest.raises(ConfigError, match="takes video"):
        engine.score(media_request((png(0),)))


def test_whisper_keeps_its_encoder_in_floating_point(
    load: Callable[..., TeacherEngine],
    extractor: Any,
    wav: Callable[[int], bytes],
    media_request: Callable[..., ScoreRequest],
) -> None:
    speech = {
        "d_model": 64, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 32, "vocab_size": 512,
        "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, **IDS, "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    engine = load("whisper-large-v3-turbo", build("WhisperForConditionalGeneration", **speech), extractor)
    assert engine.tower.coverage.left_float["model.encoder.layers.0.fc1"] == "output head or skipped by policy"
    assert engine.score(media_request((wav(0),), layers=(2,))).hidden[2].shape == (1, 50, 64)


def test_parakeet_is_heard_through_its_encoder(
    load: Callable[..., TeacherEngine], wav: Callable[[int], bytes], media_request: Callable[..., ScoreRequest]
) -> None:
    encoder = {**ENCODER, "num_mel_bins": 16, "subsampling_conv_channels": 32, "max_position_embeddings": 256}
    model = build(
        "ParakeetForTDT",
        vocab_size=129, decoder_hidden_size=64, num_decoder_layers=1, encoder_config=encoder, pad_token_id=2, blank_token_id=128,
    )  # fmt: skip
    engine = load("parakeet-tdt-0.6b-v3", model, ParakeetFeatureExtractor(feature_size=16, sampling_rate=16000))
    assert (engine.num_layers, engine.hidden_size) == (3, 64)
    assert engine.tower.coverage.left_float["joint.head"] == "output head or skipped by policy"
    targets = engine.score(media_request((wav(0), wav(1)), layers=(1,)))
    assert targets.pooled_BE is not None
    assert targets.pooled_BE.shape == (2, 64)
    assert targets.hidden[1].shape[::2] == (2, 64)


@pytest.mark.parametrize(
    "teacher_id", ["step3-vl-10b", "padt-ovd-3b", "sd3-medium", "qwen3-tts-tokenizer", "gemma-scope-2-27b"]
)
def test_teachers_that_cannot_be_had_are_refused_and_never_replaced(tmp_path: Path, teacher_id: str) -> None:
    with pytest.raises(TowerLoadError):
        TowerLoader(load_registry(), models_dir=tmp_path).load(teacher_id)
