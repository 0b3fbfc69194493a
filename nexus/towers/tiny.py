"""Every architecture of the registry built tiny from its own configuration class, saved as its owners would save it.

`nexus teachers check --tiny` loads these folders by the same path as real checkpoints: same class, same NF4 policy, same preparation
of inputs. Weights are random; what is shown is that the class loads, is quantised as its policy says, and gives its role's targets.
All sizes are multiples of 64, the block of NF4, and as small as the class allows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from nexus.towers.registry import BASE

RATE = 16_000
"""Hertz of the recordings that tiny speech models hear."""
IMAGE_SIZE = 32
"""Pixels of the images that tiny vision models see."""
VOCABULARY = 512
GPTQ_GROUP = 64
"""Features that share a scale in a tiny GPTQ checkpoint; published ones have 128."""

_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
_TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 256, **_IDS,
}  # fmt: skip
_HEADED = {**_TEXT, "head_dim": 16}
_ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
_LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
_HEARING = {
    "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128, "d_model": 64,
    "max_source_positions": 64, "output_dim": 64,
}  # fmt: skip
_SEEING = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 8, "out_hidden_size": 64,
}  # fmt: skip
_MEDIA_IDS = {"audio_token_id": 500, "image_token_id": 501, "video_token_id": 502}


def has_tiny(teacher_id: str) -> bool:
    """Whether this installation can build a teacher of the registry tiny."""
    return teacher_id in _BUILDERS


def write_tiny(teacher_id: str, folder: Path) -> None:
    """Build a teacher tiny and save it, with what prepares its inputs, to `folder`; the same bytes every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of what `spread` leaves as its class initialises it
        _BUILDERS[teacher_id](folder)


def tiny_tokenizer(**roles: str) -> PreTrainedTokenizerFast:
    """One token per printable character in a vocabulary of 512; `roles` (such as image_token) name tokens near its end."""
    special = dict(zip(range(VOCABULARY - len(roles), VOCABULARY), roles.values(), strict=True))
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *map(chr, range(32, 127)), "\n"]
    tokens += [f"<{index}>" for index in range(len(tokens), VOCABULARY)]
    vocabulary = {special.get(index, token): index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        extra_special_tokens=roles,
    )  # fmt: skip


def spread(model: nn.Module, scale: float = 0.25) -> None:
    """Random weights, the same ones whenever, of a size at which answers differ from row to row."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            # Embeddings that are also the output head would otherwise only repeat the last token.
            spread_of = 0.05 if "embed" in name else scale
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread_of


def _save(folder: Path, model: Any, *companions: Any) -> None:
    spread(model)
    # Half precision, as most checkpoints are.
    model.half().save_pretrained(folder)
    for companion in companions:
        companion.save_pretrained(folder)


def _build(class_name: str, /, **config: Any) -> Any:
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**config))


def _qwen3(folder: Path) -> None:
    _save(folder, _build("Qwen3ForCausalLM", **_HEADED), tiny_tokenizer())


def _qwen2(folder: Path) -> None:
    _save(folder, _build("Qwen2ForCausalLM", **_TEXT), tiny_tokenizer())


def _glm(folder: Path) -> None:
    _save(folder, _build("Glm4MoeLiteForCausalLM", **{**_TEXT, **_LATENT}), tiny_tokenizer())


def _kimi(folder: Path) -> None:
    model = _build(
        "Kimi_K25ForConditionalGeneration",
        text_config={"model_type": "deepseek_v3", **_TEXT, **_LATENT},
        vision_config={
            **_ENCODER, "num_hidden_layers": 2, "patch_size": 8, "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4
        },
        projection_hidden_size=64, image_token_id=500, video_token_id=501, vision_start_token_id=502, vision_end_token_id=503,
        tie_word_embeddings=False,
    )  # fmt: skip
    _save(folder, model, tiny_tokenizer())


def _gemma_model() -> Any:
    return _build(
        "Gemma3ForConditionalGeneration",
        text_config={**_HEADED, "sliding_window": 16, "query_pre_attn_scalar": 16},
        vision_config={
            **_ENCODER, "num_hidden_layers": 2, "image_size": IMAGE_SIZE, "patch_size": 8, "vision_use_head": False
        },
        mm_tokens_per_image=4, image_token_id=509, boi_token_index=510, eoi_token_index=511,
    )  # fmt: skip


def _gemma(folder: Path) -> None:
    tokenizer = tiny_tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    processor = transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}), tokenizer, image_seq_length=4
    )
    _save(folder, _gemma_model(), processor)


def _omni2(folder: Path) -> None:
    model = _build(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        text_config={**_TEXT, "rope_parameters": _ROPE},
        vision_config={
            **_SEEING, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32, "fullatt_block_indexes": [1]
        },
        audio_config={**_HEARING, "n_window": 20},
        audio_token_index=500, image_token_index=501, video_token_index=502,
        vision_start_token_id=503, vision_end_token_id=504, audio_end_token_id=505,
    )  # fmt: skip
    _save(folder, model, tiny_tokenizer())
    # As published: the thinker is one part of several, and the matrices of its language model are in GPTQ.
    config = json.loads((folder / "config.json").read_text())
    packing = {"quant_method": "gptq", "bits": 4, "group_size": GPTQ_GROUP, "sym": True, "checkpoint_format": "gptq"}
    whole = {
        "architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni", "thinker_config": config,
        "quantization_config": packing,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(whole))
    tensors = {f"thinker.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    for name in [name for name in tensors if re.fullmatch(r"thinker\.model\.layers\..*_proj\.weight", name)]:
        packed = as_gptq(tensors.pop(name))
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in packed.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def as_gptq(weight_OI: torch.Tensor) -> dict[str, torch.Tensor]:
    """A matrix rounded to the nearest of 16 codes around zero, in the tensors of a GPTQ checkpoint of version 1."""
    groups_OGI = weight_OI.float().unflatten(1, (-1, GPTQ_GROUP))
    scales_OG = groups_OGI.abs().amax(-1).clamp(min=1e-6) / 7
    codes_OI = (groups_OGI / scales_OG[..., None]).round().add(8).clamp(0, 15).to(torch.int64).flatten(1)
    zeros_GO = torch.full_like(scales_OG.T, 8 - 1, dtype=torch.int64)
    shifts = torch.arange(0, 32, 4)
    return {
        # Eight codes fill a number; the highest may set its sign.
        "qweight": (codes_OI.T.unflatten(0, (-1, 8)) << shifts[:, None]).sum(1).to(torch.int32),
        "qzeros": (zeros_GO.unflatten(1, (-1, 8)) << shifts).sum(2).to(torch.int32),
        "scales": scales_OG.T.contiguous().half(),
        "g_idx": (torch.arange(weight_OI.shape[1]) // GPTQ_GROUP).to(torch.int32),
    }


def _omni3(folder: Path) -> None:
    model = _build(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        text_config={
            **_HEADED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "rope_parameters": {**_ROPE, "mrope_interleaved": True},
        },
        vision_config={**_SEEING, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        # The length formula of this class holds for windows of 50 only.
        audio_config={
            **_HEARING, "n_window": 50, "n_window_infer": 100, "conv_chunksize": 50, "downsample_hidden_size": 32
        },
        # No field of the class, but its forward asks for it; published configurations have it.
        vision_start_token_id=503,
        **_MEDIA_IDS,
    )  # fmt: skip
    _save(folder, model, tiny_tokenizer())


def _siglip(folder: Path) -> None:
    model = _build("SiglipVisionModel", **_ENCODER, image_size=IMAGE_SIZE, patch_size=8)
    _save(folder, model, SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}))


def _videomae(folder: Path) -> None:
    model = _build("VideoMAEModel", **_ENCODER, image_size=IMAGE_SIZE, patch_size=8, num_frames=4, tubelet_size=2)
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    _save(folder, model, VideoMAEImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop))


def _whisper(folder: Path) -> None:
    model = _build(
        "WhisperForConditionalGeneration",
        d_model=64, num_mel_bins=16, max_source_positions=50, max_target_positions=32, vocab_size=VOCABULARY,
        encoder_layers=3, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128, encoder_attention_heads=4,
        decoder_attention_heads=4, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None, **_IDS,
    )  # fmt: skip
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=16, sampling_rate=RATE, hop_length=160, n_fft=400, chunk_length=1, return_attention_mask=False
    )
    _save(folder, model, extractor, tiny_tokenizer())


def _parakeet(folder: Path) -> None:
    encoder = {**_ENCODER, "num_mel_bins": 16, "subsampling_conv_channels": 32, "max_position_embeddings": 256}
    model = _build(
        "ParakeetForTDT",
        vocab_size=129, decoder_hidden_size=64, num_decoder_layers=1, encoder_config=encoder, pad_token_id=2, blank_token_id=128,
    )  # fmt: skip
    _save(folder, model, transformers.ParakeetFeatureExtractor(feature_size=16, sampling_rate=RATE))


def _vibevoice(folder: Path) -> None:
    encoder = {
        "model_type": "vibevoice_acoustic_tokenizer_encoder", "hidden_size": 64, "num_filters": 4,
        # The processor counts one token for every 3,200 samples.
        "downsampling_ratios": [8, 20, 20], "depths": [1, 1, 1, 1],
    }  # fmt: skip
    model = _build(
        "VibeVoiceAsrForConditionalGeneration",
        acoustic_tokenizer_encoder_config=encoder,
        semantic_tokenizer_encoder_config=encoder,
        text_config={**_TEXT, "model_type": "qwen2", "intermediate_size": 256},
        audio_token_id=509, audio_bos_token_id=510, audio_eos_token_id=511, acoustic_tokenizer_chunk_size=6400,
    )  # fmt: skip
    names = {"audio_token": "<audio>", "audio_bos_token": "<boa>", "audio_eos_token": "<eoa>"}
    processor = transformers.VibeVoiceAsrProcessor(
        transformers.VibeVoiceAcousticTokenizerFeatureExtractor(),
        tiny_tokenizer(**names),
        **names,
    )
    _save(folder, model, processor)


def _gemma_scope(folder: Path) -> None:
    _gemma(folder / BASE)
    generator = torch.Generator().manual_seed(0)
    for layer in (0, 2):
        site = folder / "resid_post" / f"layer_{layer}_width_256_l0_small"
        site.mkdir(parents=True)
        tensors = {
            "w_enc": torch.randn(64, 256, generator=generator) / 8, "b_enc": torch.zeros(256), "threshold": torch.ones(256),
            "w_dec": torch.randn(256, 64, generator=generator) / 8, "b_dec": torch.zeros(64),
        }  # fmt: skip
        save_file(tensors, site / "params.safetensors")
        (site / "config.json").write_text(json.dumps({"architecture": "jump_relu", "width": 256}))


def _personaplex(folder: Path) -> None:
    codec = {
        "model_type": "mimi", "hidden_size": 32, "num_filters": 8, "upsampling_ratios": [2, 2], "codebook_size": 64,
        "codebook_dim": 16, "num_quantizers": 8, "vector_quantization_hidden_dimension": 16, "upsample_groups": 32,
        "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 32,
    }  # fmt: skip
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    model = _build(
        "MoshiForConditionalGeneration",
        vocab_size=64, num_hidden_layers=3, ffn_dim=256, max_position_embeddings=128, sliding_window=64, num_codebooks=4, **sizes,
        audio_encoder_config=codec, audio_vocab_size=64,
        depth_decoder_config={
            **sizes, "ffn_dim": 128, "num_hidden_layers": 2, "max_position_embeddings": 5, "sliding_window": 4
        },
    )  # fmt: skip
    # Codebooks are buffers, all zero before training: every frame would have the same code.
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    _save(folder, model, transformers.EncodecFeatureExtractor(sampling_rate=400))


def _clip_tokenizer() -> Any:
    # Byte-pair encoding without merges: one token per character.
    letters = [*map(chr, range(97, 123)), *map(str, range(10)), ".", ","]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return transformers.CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=77
    )


def _tiny_vae(class_name: str, **sizes: Any) -> Any:
    import diffusers

    return getattr(diffusers, class_name)(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, **sizes,
    )  # fmt: skip


def _save_pipeline(folder: Path, pipeline: Any) -> None:
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            spread(component, scale=0.1)
            component.half()
    pipeline.save_pretrained(folder)


def _sd3(folder: Path) -> None:
    import diffusers

    tokenizer = _clip_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = [
        _build("CLIPTextModelWithProjection", **sizes, vocab_size=len(tokenizer), projection_dim=64, bos_token_id=0, eos_token_id=1)
        for _ in range(2)
    ]  # fmt: skip
    t5_tokenizer = transformers.T5Tokenizer(
        vocab=[
            ("<pad>", 0.0),
            ("</s>", 0.0),
            ("<unk>", -9.0),
            *((chr(code), -3.0) for code in (0x2581, *range(97, 123))),
        ],
        extra_ids=0,
    )
    t5 = _build("T5EncoderModel", d_model=128, d_ff=128, d_kv=32, num_heads=4, num_layers=2, vocab_size=64)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        caption_projection_dim=64, joint_attention_dim=128, pooled_projection_dim=128, pos_embed_max_size=16,
    )  # fmt: skip
    vae = _tiny_vae(
        "AutoencoderKL",
        up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae,
        clip[0],
        tokenizer,
        clip[1],
        tokenizer,
        t5,
        t5_tokenizer,
    )
    _save_pipeline(folder, pipeline)


def _svd(folder: Path) -> None:
    import diffusers

    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(64, 128), layers_per_block=1, sample_size=8, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=64, num_attention_heads=(4, 4), projection_class_embeddings_input_dim=192,
        addition_time_embed_dim=64, num_frames=2,
    )  # fmt: skip
    # The pipeline shrinks every picture to 224 pixels for this encoder.
    clip = _build("CLIPVisionModelWithProjection", **_ENCODER, image_size=224, patch_size=28, projection_dim=64)
    pipeline = diffusers.StableVideoDiffusionPipeline(
        _tiny_vae("AutoencoderKLTemporalDecoder"),
        clip,
        unet,
        diffusers.EulerDiscreteScheduler(),
        CLIPImageProcessorPil(),
    )
    _save_pipeline(folder, pipeline)


_BUILDERS: Mapping[str, Callable[[Path], None]] = {
    "agentcpm-explore": _qwen3,
    "glm-4.7-flash": _glm,
    "kimi-k2.5": _kimi,
    "qwen2.5-0.5b": _qwen2,
    "qwen2.5-coder-7b": _qwen2,
    "translategemma-4b": _gemma,
    "qwen2.5-omni-7b": _omni2,
    "qwen3-omni-30b": _omni3,
    "siglip2-so400m": _siglip,
    "videomae-large": _videomae,
    "whisper-large-v3-turbo": _whisper,
    "parakeet-tdt-0.6b-v3": _parakeet,
    "vibevoice-asr": _vibevoice,
    "gemma-scope-2-27b": _gemma_scope,
    "personaplex-7b": _personaplex,
    "sd3-medium": _sd3,
    "svd-xt-1.1": _svd,
}
