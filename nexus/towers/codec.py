"""What a neural audio codec gives as a teacher: a recording's codes, the latents that they stand for, and how it sounds decoded.

Codecs stay in floating point. A recording is encoded whole, with all quantisers that the codec has, row by row: lengths differ, and
padding would be heard. Residual vector quantisation: Zeghidour et al. 2021, https://arxiv.org/abs/2107.03312, section III-C.
Shape letters: Q quantisers, F frames (also torch.nn.functional), E width of the latents, T samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.data.media import add_noise, decode_audio
from nexus.errors import ConfigError, DataError
from nexus.towers.rows import RowsError
from nexus.towers.targets import CodecTargets, ScoreRequest


@dataclass(frozen=True)
class Coded:
    """One recording as a codec holds it."""

    codes_QF: Tensor
    latents_EF: Tensor
    """What its decoder reads."""
    samples_T: Tensor
    """Decoded; may be longer than what was encoded."""


def _mimi(model: Any, samples_11T: Tensor) -> Coded:
    codes_1QF = model.encode(samples_11T).audio_codes
    samples = model.decode(codes_1QF).audio_values
    return Coded(codes_1QF[0], model.quantizer.decode(codes_1QF)[0], samples[0, 0])


def _encodec(model: Any, samples_11T: Tensor) -> Coded:
    # The highest bandwidth is the one with all quantisers; the list is sorted in every published configuration, but need not be.
    encoded = model.encode(samples_11T, bandwidth=max(model.config.target_bandwidths))
    codes_1QF = encoded.audio_codes[0]
    samples = model.decode(encoded.audio_codes, encoded.audio_scales).audio_values
    return Coded(codes_1QF[0], model.quantizer.decode(codes_1QF.transpose(0, 1))[0], samples[0, 0])


def _dac(model: Any, samples_11T: Tensor) -> Coded:
    # Its convolutions drop what does not fill a frame.
    missing = -samples_11T.shape[-1] % math.prod(model.config.downsampling_ratios)
    encoded = model.encode(F.pad(samples_11T, (0, missing)))
    samples = model.decode(quantized_representation=encoded.quantized_representation).audio_values
    return Coded(encoded.audio_codes[0], encoded.quantized_representation[0], samples.flatten())


AskCodec = Callable[[Any, Tensor], Coded]
"""Codes a recording [1, 1, T] with a model."""

CODECS: Mapping[str, AskCodec] = {
    "DacModel": _dac,
    "EncodecModel": _encodec,
    "MimiModel": _mimi,
}
"""Class of transformers -> how it is asked."""


def score_codec(model: Any, sampling_rate: int, ask: AskCodec, request: ScoreRequest) -> CodecTargets:
    """Codes, latents and reconstruction of every recording, rows in the request's order.

    Args:
        sampling_rate: hertz that the codec hears.
        ask: of CODECS, for the class of `model`.

    Raises:
        ConfigError: hidden states were asked for, of which a codec has none to give.
        RowsError: recordings that cannot be decoded or whose results are not finite.
    """
    assert request.media is not None
    if request.layers:
        raise ConfigError(
            f"Expected no layers for the codec {type(model).__name__}, which gives latents, found {request.layers[0]}. Leave them "
            "out."
        )
    kept: list[Coded] = []
    lengths: list[int] = []
    errors: list[float] = []
    bad: dict[str, str] = {}
    for row_id, data in zip(request.row_ids, request.media, strict=True):
        try:
            waveform = decode_audio(data, sampling_rate)
        except DataError as error:
            bad[row_id] = str(error)
            continue
        if request.snr_db is not None:
            waveform = add_noise(waveform, row_id, request.snr_db)
        samples_T = torch.from_numpy(waveform).to(model.device, model.dtype)
        with torch.inference_mode():
            coded = ask(model, samples_T[None, None])
        common = min(len(samples_T), len(coded.samples_T))
        difference_T = coded.samples_T[:common].float() - samples_T[:common].float()
        if not (difference_T.isfinite().all() and coded.latents_EF.to(torch.float16).isfinite().all()):
            bad[row_id] = "not finite"
            continue
        kept.append(coded)
        lengths.append(common)
        errors.append(float(difference_T.square().mean()))
    if bad:
        raise RowsError("Expected recordings that the codec can encode in every row; mend or drop the rows.", bad)
    return CodecTargets(
        frame_offsets_B1=_offsets([coded.codes_QF.shape[1] for coded in kept]),
        codes_FQ=torch.cat([coded.codes_QF.T for coded in kept]).to(torch.int32).cpu().numpy(),
        latents_FE=torch.cat([coded.latents_EF.T for coded in kept]).to(torch.float16).cpu().numpy(),
        sample_offsets_B1=_offsets(lengths),
        samples_T=torch.cat([c.samples_T[:n] for c, n in zip(kept, lengths, strict=True)]).float().cpu().numpy(),
        sampling_rate=sampling_rate,
        mse_B=np.array(errors, dtype=np.float32),
    )


def _offsets(lengths: list[int]) -> np.ndarray:
    offsets_B1: np.ndarray = np.cumsum([0, *lengths], dtype=np.int64)
    return offsets_B1
