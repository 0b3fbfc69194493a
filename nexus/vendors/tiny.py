"""Builds the teachers of vendors' packages tiny from their own configuration classes, as `nexus.towers.tiny` does the others.

Runs in the package's environment. Weights are random; sizes are multiples of 64, the block of NF4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

RATE = 400
"""Hertz of the recordings that tiny codecs hear."""
NUM_CODES = 64


def write_tiny(library: str, role: str, folder: Path) -> None:
    """Build a teacher of `library` tiny and save it to `folder`."""
    if library == "parler-tts":
        _parler(folder)
    elif role == "codec":
        _save(_qwen_codec(), folder)
    else:
        _qwen_talker(folder)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character, in a vocabulary of 128."""
    tokens = ["<pad>", "</s>", "<unk>", "\n", *map(chr, range(32, 127))]
    tokens += [f"<{index}>" for index in range(len(tokens), 126)] + ["<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


def _save(model: Any, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (0.05 if "embed" in name else 0.2)
    # Codebooks are buffers, all zero before training: every frame would have the same code.
    for name, buffer in model.named_buffers():
        if name.endswith(("embed_sum", "embedding_sum")):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(folder)


def _qwen_codec() -> nn.Module:
    from qwen_tts.core.tokenizer_12hz.configuration_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Config  # type: ignore[import-not-found]
    from qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Model  # type: ignore[import-not-found]

    encoder = {
        "hidden_size": 32, "num_filters": 8, "upsampling_ratios": [2, 2], "codebook_size": NUM_CODES, "codebook_dim": 16,
        "num_quantizers": 8, "vector_quantization_hidden_dimension": 16, "upsample_groups": 32, "num_hidden_layers": 2,
        "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 32,
        "sampling_rate": RATE,
    }  # fmt: skip
    decoder = {
        "codebook_size": NUM_CODES, "hidden_size": 32, "latent_dim": 32, "codebook_dim": 32, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 8, "sliding_window": 16, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_quantizers": 4, "upsample_rates": [2, 2], "upsampling_ratios": [2], "decoder_dim": 32,
    }  # fmt: skip
    config = Qwen3TTSTokenizerV2Config(
        encoder_config=encoder, decoder_config=decoder, encoder_valid_num_quantizers=4, input_sample_rate=RATE,
        output_sample_rate=RATE, decode_upsample_rate=8, encode_downsample_rate=8,
    )  # fmt: skip
    return Qwen3TTSTokenizerV2Model(config)


def _qwen_talker(folder: Path) -> None:
    from qwen_tts.core.models.configuration_qwen3_tts import Qwen3TTSConfig  # type: ignore[import-not-found]
    from qwen_tts.core.models.modeling_qwen3_tts import Qwen3TTSForConditionalGeneration  # type: ignore[import-not-found]

    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_code_groups": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    talker = {
        **sizes, "num_hidden_layers": 3, "vocab_size": 96, "text_hidden_size": 64, "text_vocab_size": 128,
        "code_predictor_config": {**sizes, "num_hidden_layers": 2, "vocab_size": NUM_CODES},
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3], "interleaved": True},
        "codec_eos_token_id": 70, "codec_think_id": 71, "codec_nothink_id": 72, "codec_think_bos_id": 73,
        "codec_think_eos_id": 74, "codec_pad_id": 75, "codec_bos_id": 76,
        "spk_id": {"ann": 80}, "spk_is_dialect": {"ann": False}, "codec_language_id": {"english": 81},
    }  # fmt: skip
    config = Qwen3TTSConfig(
        talker_config=talker, tokenizer_type="qwen3_tts_tokenizer_12hz", tts_model_type="custom_voice", tts_model_size="tiny",
        im_start_token_id=126, im_end_token_id=127, tts_pad_token_id=120, tts_bos_token_id=121, tts_eos_token_id=122,
    )  # fmt: skip
    _save(Qwen3TTSForConditionalGeneration(config), folder)
    tiny_tokenizer().save_pretrained(folder)
    _save(_qwen_codec(), folder / "speech_tokenizer")


def _parler(folder: Path) -> None:
    from parler_tts import ParlerTTSConfig, ParlerTTSDecoderConfig, ParlerTTSForConditionalGeneration  # type: ignore[import-not-found]
    from transformers import DacConfig, T5Config

    text = T5Config(d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=2, vocab_size=128)
    codec = DacConfig(
        encoder_hidden_size=8, downsampling_ratios=[2, 2], decoder_hidden_size=16, n_codebooks=4, codebook_size=NUM_CODES,
        codebook_dim=8, sampling_rate=RATE,
    )  # fmt: skip
    decoder = ParlerTTSDecoderConfig(
        vocab_size=80, hidden_size=64, ffn_dim=128, num_hidden_layers=3, num_attention_heads=4, num_codebooks=4,
        max_position_embeddings=512, pad_token_id=64, eos_token_id=64, bos_token_id=65,
    )  # fmt: skip
    _save(
        ParlerTTSForConditionalGeneration(ParlerTTSConfig.from_sub_models_config(text, codec, decoder, vocab_size=128)),
        folder,
    )
    tiny_tokenizer().save_pretrained(folder)
