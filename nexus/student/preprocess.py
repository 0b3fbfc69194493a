"""What the student sees and hears: encoded media bytes to adapter inputs, the same in training and in the bundle.

The settings are a strict model that travels in the bundle's manifest, so that an exported student prepares its input exactly as it
was trained to.

Shape letters: B rows, C channels, H height, W width, S samples, T mel frames,
M mel bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from nexus.adapters.audio import log_mel
from nexus.artifacts import StrictModel
from nexus.data.media import add_noise, decode_audio, decode_image


class ImagePreprocessing(StrictModel):
    """Images of any size and mode become one small square."""

    image_size: int = Field(gt=0)
    """Height and width in pixels; other sizes are resampled, without keeping the aspect ratio."""
    channels: Literal[1, 3]
    """1 is luminance, 3 is RGB."""


class AudioPreprocessing(StrictModel):
    """Recordings of any rate and length become one fixed log-mel window."""

    sampling_rate: int = Field(gt=0)
    """Hz."""
    seconds: float = Field(gt=0)
    """Longer recordings are cut, shorter ones padded with zeros and masked."""
    num_mels: int = Field(gt=0)
    window_size: int = Field(gt=0)
    """Samples of one analysis window."""
    hop_size: int = Field(gt=0)
    """Samples between two frames."""

    @property
    def num_samples(self) -> int:
        """Samples of the fixed window."""
        return round(self.seconds * self.sampling_rate)


class Preprocessing(StrictModel):
    """Settings of a student's media; None where it has no such adapter."""

    image: ImagePreprocessing | None
    audio: AudioPreprocessing | None


def pixel_values(images: Sequence[bytes], config: ImagePreprocessing) -> Tensor:
    """float32 [B, C, H, W] in [-1, 1], 0 being mid-grey.

    Raises:
        DataError: when bytes are no readable image.
    """
    size = (config.image_size, config.image_size)
    rows = []
    for data in images:
        image = decode_image(data)
        if config.channels == 1:
            image = image.convert("L")
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        pixels_HWC = np.asarray(image, dtype=np.float32).reshape(*size, config.channels)
        rows.append(torch.from_numpy(pixels_HWC / 127.5 - 1.0).permute(2, 0, 1))
    return torch.stack(rows)


def log_mel_features(
    clips: Sequence[bytes],
    config: AudioPreprocessing,
    *,
    row_ids: Sequence[str] | None = None,
    snr_db: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-mel features float32 [B, M, T] of the fixed window and bool [B, T], True where a frame begins inside the recording.

    Args:
        clips: encoded recordings.
        config: the student's settings.
        row_ids: whose noise each row gets; needed with `snr_db`.
        snr_db: noise added before the recording is cut (see `nexus.data.media.add_noise`); None adds none.

    Raises:
        DataError: when bytes are no readable recording.
        ValueError: when noise is asked for without row ids.
    """
    if snr_db is not None and row_ids is None:
        raise ValueError("Expected row_ids beside snr_db, found none: noise belongs to a row. Pass the records' ids.")
    waveforms = []
    for row, data in enumerate(clips):
        samples_S = decode_audio(data, config.sampling_rate)
        if snr_db is not None and row_ids is not None:
            samples_S = add_noise(samples_S, row_ids[row], snr_db)
        waveforms.append(torch.from_numpy(samples_S[: config.num_samples]))
    return log_mel(
        waveforms,
        num_samples=config.num_samples,
        sampling_rate=config.sampling_rate,
        num_mels=config.num_mels,
        window_size=config.window_size,
        hop_size=config.hop_size,
    )
