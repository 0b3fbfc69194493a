"""Qwen3-TTS as a teacher: the distribution of every code of a recording, given its text; and its codec by itself.

The talker writes the first code of a frame from the text and the frames before, the code predictor the others from the talker's state
and one another. A row's recording is given as codes (teacher forcing), its prompt is the text. In front of the text, before an empty
line, may stand a preset speaker's name (CustomVoice) or the description of a voice (VoiceDesign).

Embeddings are put together as the package's own `generate` does, the text streamed frame by frame. Letters: F frames, Q codebooks,
H width of the talker, T samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from qwen_tts.core.models.configuration_qwen3_tts import Qwen3TTSConfig  # type: ignore[import-not-found]
from qwen_tts.core.models.modeling_qwen3_tts import Qwen3TTSForConditionalGeneration  # type: ignore[import-not-found]
from qwen_tts.core.tokenizer_12hz.configuration_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Config  # type: ignore[import-not-found]
from qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Model  # type: ignore[import-not-found]
from torch import Tensor
from transformers import AutoTokenizer

from nexus.artifacts import fingerprint_of
from nexus.errors import DataError
from nexus.towers.codec import Coded
from nexus.towers.registry import TeacherSpec
from nexus.vendors.blocks import recorded
from nexus.vendors.engine import PackedShare, ScoredCodes, VendorModel, read_model

CODEC_FOLDER = "speech_tokenizer"
"""Where a talker's checkpoint has its codec."""
FOREIGN_KEYS = ("model_type", "transformers_version", "torch_dtype", "dtype", "architectures")
"""What saving writes into nested configurations that their classes do not take."""


def load(spec: TeacherSpec, device: torch.device, *, quantise: bool) -> tuple[VendorModel, PackedShare, str]:
    """The talker with its codec, or the codec alone."""
    folder = Path(spec.path)
    if spec.role == "codec":
        codec, share, digest = read_model(spec, folder, build_codec, device, quantise=False)
        width = int(codec.config.decoder_config.codebook_dim)
        return VendorModel(codec, codec.input_sample_rate, width, (), codec=ask_codec), share, digest
    model, share, talker_digest = read_model(spec, folder, build_talker, device, quantise=quantise)
    codec, _, codec_digest = read_model(spec, folder / CODEC_FOLDER, build_codec, device, quantise=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    config = model.config.talker_config

    def score(prompt: str, samples_T: Tensor, layers: Sequence[int]) -> ScoredCodes:
        codes_FQ = ask_codec(codec, samples_T[None, None].to(codec.device, codec.dtype)).codes_QF.T[
            :, : config.num_code_groups
        ]
        return score_codes(model, tokenizer, prompt, codes_FQ, layers)

    loaded = VendorModel(
        model,
        codec.input_sample_rate,
        config.hidden_size,
        tuple(model.talker.model.layers),
        config.vocab_size,
        score=score,
    )
    return loaded, share, fingerprint_of([talker_digest, codec_digest])


def build_talker(config: dict[str, Any]) -> Any:
    """The model of a config.json, without weights."""
    speaker = {
        name: value
        for name, value in (config.pop("speaker_encoder_config", None) or {}).items()
        if name not in FOREIGN_KEYS
    }
    return Qwen3TTSForConditionalGeneration(Qwen3TTSConfig(**config, speaker_encoder_config=speaker))


def build_codec(config: dict[str, Any]) -> Any:
    """The codec of a config.json, without weights."""
    return Qwen3TTSTokenizerV2Model(Qwen3TTSTokenizerV2Config(**config))


def ask_codec(model: Any, samples_11T: Tensor) -> Coded:
    """As `nexus.towers.codec.CODECS`."""
    mask_1T = torch.ones(1, samples_11T.shape[-1], dtype=torch.long, device=samples_11T.device)
    codes_FQ = model.encode(samples_11T[0], mask_1T, return_dict=True).audio_codes[0]
    latents = model.decoder.quantizer.decode(codes_FQ.T[None])
    return Coded(codes_FQ.T, latents[0], model.decode(codes_FQ[None], return_dict=True).audio_values[0])


def score_codes(model: Any, tokenizer: Any, prompt: str, codes_FQ: Tensor, layers: Sequence[int]) -> ScoredCodes:
    """Logits of every code given the text and the codes before it."""
    talker, config = model.talker, model.config.talker_config
    voice, _, text = prompt.rpartition("\n\n")
    device = talker.device

    def code(ids: Sequence[int]) -> Tensor:
        embedded: Tensor = talker.get_input_embeddings()(torch.tensor([list(ids)], device=device))
        return embedded

    def word(ids: Sequence[int]) -> Tensor:
        projected: Tensor = talker.text_projection(
            talker.get_text_embeddings()(torch.tensor([list(ids)], device=device))
        )
        return projected

    def tokenise(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    text_ids = tokenise(text)
    if not text_ids or not len(codes_FQ):
        raise DataError("expected text to speak and a recording of at least one frame; mend or drop the row")
    ids = model.config
    begin, end, pad = word([ids.tts_bos_token_id, ids.tts_eos_token_id, ids.tts_pad_token_id]).chunk(3, dim=1)
    tags = [config.codec_nothink_id, config.codec_think_bos_id, config.codec_think_eos_id]
    front = []
    speakers = config.spk_id or {}
    if voice and ids.tts_model_type == "custom_voice":
        if voice.lower() not in speakers:
            raise DataError(
                f"expected one of the speakers {', '.join(speakers)}; found {voice!r}; correct or drop the row"
            )
        tags.append(speakers[voice.lower()])
    elif voice:
        front.append(word(tokenise(f"<|im_start|>user\n{voice}<|im_end|>\n")))
    tag_states = code([*tags, config.codec_pad_id, config.codec_bos_id])
    front.append(word(tokenise("<|im_start|>assistant\n")))
    front.append(torch.cat([pad.expand(-1, tag_states.shape[1] - 2, -1), begin], dim=1) + tag_states[:, :-1])
    front.append(word(text_ids[:1]) + tag_states[:, -1:])
    num_frames = len(codes_FQ)
    spoken = torch.cat([*([word(text_ids[1:])] if text_ids[1:] else []), end], dim=1)[:, :num_frames]
    spoken = torch.cat([spoken, pad.expand(-1, num_frames - spoken.shape[1], -1)], dim=1)
    others = talker.code_predictor.get_input_embeddings()
    frames = code(codes_FQ[:, 0].tolist())
    for book in range(1, codes_FQ.shape[1]):
        frames = frames + others[book - 1](codes_FQ[None, :, book])
    inputs = torch.cat([*front, (frames + spoken)[:, :-1]], dim=1)
    length = inputs.shape[1]
    positions = torch.arange(length, device=device).expand(3, 1, -1)
    with recorded(talker.model.layers, layers) as states:
        output = talker.model(
            inputs_embeds=inputs,
            attention_mask=torch.ones(1, length, dtype=torch.long, device=device),
            position_ids=positions,
            use_cache=False,
        )
    state_FH = output.last_hidden_state[0, -num_frames:]
    parts = [state_FH[:, None], code(codes_FQ[:, 0].tolist())[0][:, None]]
    parts += [others[book - 1](codes_FQ[:, book : book + 1]) for book in range(1, codes_FQ.shape[1] - 1)]
    predicted = talker.code_predictor.forward_finetune(inputs_embeds=torch.cat(parts, dim=1), use_cache=False).logits
    logits = [talker.codec_head(state_FH), *predicted.unbind(dim=1)]
    return ScoredCodes(codes_FQ, logits, {layer: state[0, -num_frames:] for layer, state in states.items()})
