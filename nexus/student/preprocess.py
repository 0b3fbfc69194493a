"""What the student sees and hears: encoded media bytes to adapter inputs, the same in training and in the bundle.

The sizes and rates are those of the student's own adapters, so an exported student prepares its input exactly as it was trained
to, without any teacher's processor.

Shape letters: M images or clips, C channels, H height, W width, R mel bands, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nexus.adapters.audio import AudioAdapterConfig
from nexus.adapters.vision import VisionAdapterConfig
from nexus.data.media import add_noise, decode_audio, decode_image
from nexus.errors import DataError
from nexus.student.memory import MediaBatch
from nexus.student.presets import StudentSpec


@dataclass(frozen=True)
class Noise:
    """White noise on one recording; the same row always gets the same noise."""

    row_id: str
    snr_db: float


@dataclass(frozen=True)
class MediaInput:
    """The encoded media of one row, as they stand in a record."""

    image: bytes | None = None
    audio: bytes | None = None
    noise: Noise | None = None
    """Added to the recording before anything else; None adds none."""


def media_batch(rows: Sequence[MediaInput], spec: StudentSpec) -> MediaBatch:
    """The media of a batch as the student's towers take them; rows keep their places.

    Raises:
        DataError: when bytes cannot be decoded, or the student has no tower for them.
    """
    pictured = [row for row, media in enumerate(rows) if media.image is not None]
    heard = [row for row, media in enumerate(rows) if media.audio is not None]
    pixels = features = frame_mask = None
    if pictured:
        if spec.vision is None:
            raise DataError(_no_tower("an image", "vision"))
        pixels = pixel_values([image for media in rows if (image := media.image) is not None], spec.vision)
    if heard:
        if spec.audio is None:
            raise DataError(_no_tower("a recording", "audio"))
        features, frame_mask = log_mel_features(
            [clip for media in rows if (clip := media.audio) is not None],
            spec.audio,
            noise=[rows[row].noise for row in heard],
        )
    return MediaBatch(
        pixel_values=pixels,
        pixel_rows=torch.tensor(pictured) if pictured else None,
        input_features=features,
        frame_mask=frame_mask,
        audio_rows=torch.tensor(heard) if heard else None,
    )


def pixel_values(images: Sequence[bytes], config: VisionAdapterConfig) -> Tensor:
    """float32 [M, C, H, W] in [-1, 1], 0 being mid-grey; images of another size are resized.

    Raises:
        DataError: when bytes are no readable image.
    """
    return config.pixel_values([np.asarray(decode_image(data)) for data in images])


def log_mel_features(
    clips: Sequence[bytes], config: AudioAdapterConfig, *, noise: Sequence[Noise | None] | None = None
) -> tuple[Tensor, Tensor]:
    """Log-mel features float32 [M, R, T] and bool [M, T], True where a frame begins inside the recording.

    Recordings are resampled to the adapter's rate; what is longer than its window is cut off at the end.

    Args:
        noise: one entry per clip.

    Raises:
        DataError: when bytes are no readable recording.
    """
    waveforms = []
    for data, added in zip(clips, noise or [None] * len(clips), strict=True):
        samples = decode_audio(data, config.sampling_rate)
        if added is not None:
            samples = add_noise(samples, added.row_id, added.snr_db)
        waveforms.append(torch.from_numpy(samples[: config.num_samples]))
    return config.log_mel(waveforms)


def _no_tower(what: str, tower: str) -> str:
    return (
        f"Expected input that the student has towers for, found {what} and no {tower} tower. "
        "Leave it out, or use a student with one."
    )
