"""Parler-TTS as a teacher: the distribution of every code of a recording, given its text and the description of the voice.

One decoder writes all codebooks, each a frame later than the one before (delay pattern of MusicGen, Copet et al. 2023,
https://arxiv.org/abs/2306.05284, section 2.2). A row's recording is given as codes (teacher forcing). Its prompt is the
description of the voice, an empty line, and the text. Letters: F frames, Q codebooks, S decoder steps, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parler_tts import ParlerTTSConfig, ParlerTTSForConditionalGeneration  # type: ignore[import-not-found]
from torch import Tensor
from transformers import AutoTokenizer

from nexus.errors import DataError
from nexus.towers.registry import TeacherSpec
from nexus.vendors.blocks import recorded
from nexus.vendors.engine import PackedShare, ScoredCodes, VendorModel, read_model


def load(spec: TeacherSpec, device: torch.device, *, quantise: bool) -> tuple[VendorModel, PackedShare, str]:
    """The model with its text encoder and codec."""
    folder = Path(spec.path)
    model, share, digest = read_model(spec, folder, build, device, quantise=quantise)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def score(prompt: str, samples_T: Tensor, layers: Sequence[int]) -> ScoredCodes:
        with torch.inference_mode():
            encoded = model.audio_encoder.encode(samples_T[None, None].to(device, model.dtype))
        codes_FQ = encoded.audio_codes.reshape(-1, *encoded.audio_codes.shape[-2:])[0].T
        return score_codes(model, tokenizer, prompt, codes_FQ, layers)

    decoder = model.config.decoder
    loaded = VendorModel(
        model,
        int(model.config.audio_encoder.sampling_rate),
        int(decoder.hidden_size),
        tuple(model.decoder.model.decoder.layers),
        int(decoder.vocab_size),
        score=score,
    )
    return loaded, share, digest


def build(config: dict[str, Any]) -> Any:
    """The model of a config.json, without weights."""
    return ParlerTTSForConditionalGeneration(ParlerTTSConfig(**config))


def score_codes(model: Any, tokenizer: Any, prompt: str, codes_FQ: Tensor, layers: Sequence[int]) -> ScoredCodes:
    """Logits of every code given description, text and the codes before it."""
    voice, _, text = prompt.rpartition("\n\n")
    config = model.config.decoder
    num_frames, num_books = codes_FQ.shape
    if not voice or not text or not num_frames:
        raise DataError(
            "expected the description of a voice, an empty line, text to speak, and a recording of at least one frame; mend or drop "
            "the row"
        )
    steps = num_frames + num_books - 1
    # Step s reads what step s - 1 wrote; codebook q wrote its frame t at step t + q.
    inputs_QS = torch.full((num_books, steps), config.pad_token_id, device=codes_FQ.device)
    for book in range(num_books):
        inputs_QS[book, : book + 1] = config.bos_token_id
        written = min(num_frames, steps - book - 1)
        inputs_QS[book, book + 1 : book + 1 + written] = codes_FQ[:written, book]

    def tokenise(part: str) -> Tensor:
        ids: Tensor = tokenizer(part, return_tensors="pt").input_ids.to(model.device)
        return ids

    with recorded(model.decoder.model.decoder.layers, layers) as states:
        output = model(
            input_ids=tokenise(voice),
            prompt_input_ids=tokenise(text),
            decoder_input_ids=inputs_QS,
            use_cache=False,
            return_dict=True,
        )
    # The text's states stand in front of the codes'.
    logits_QSV = output.logits[:, -steps:]
    logits = [logits_QSV[book, book : book + num_frames] for book in range(num_books)]
    hidden = {layer: state[0, -steps:][:num_frames] for layer, state in states.items()}
    return ScoredCodes(codes_FQ, logits, hidden)
