"""Rows to what the student's towers take, the same in training, evaluation and the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nexus.data.records import Media, Record
from nexus.errors import DataError
from nexus.student.memory import MediaBatch
from nexus.student.preprocess import Preprocessing, log_mel_features, pixel_values


def read_media(media: Media) -> bytes:
    """The encoded bytes, read from disk where the row names a path.

    Raises:
        DataError: when the file cannot be read.
    """
    if isinstance(media.data, bytes):
        return media.data
    try:
        return Path(media.data).read_bytes()
    except OSError as error:
        raise DataError(f"Expected the {media.kind} {media.data}, found: {error.strerror}. Restore the file or remove its row.") from None


def media_batch(records: Sequence[Record], preprocessing: Preprocessing, *, snr_db: float | None) -> MediaBatch:
    """The images and recordings of a batch of rows, decoded and preprocessed; media without a tower are left out.

    Args:
        records: rows in batch order.
        preprocessing: the student's settings.
        snr_db: noise added to recordings, deterministic per row id; None adds none.

    Raises:
        DataError: when media cannot be read or decoded.
    """
    images = [(row, record.media) for row, record in enumerate(records) if record.media and record.media.kind == "image"]
    clips = [(row, record.media) for row, record in enumerate(records) if record.media and record.media.kind == "audio"]
    pixels = features = frame_mask = None
    if images and preprocessing.image is not None:
        pixels = pixel_values([read_media(media) for _, media in images], preprocessing.image)
    if clips and preprocessing.audio is not None:
        features, frame_mask = log_mel_features(
            [read_media(media) for _, media in clips],
            preprocessing.audio,
            row_ids=[records[row].id for row, _ in clips],
            snr_db=snr_db,
        )
    return MediaBatch(
        pixel_values=pixels,
        pixel_rows=None if pixels is None else torch.tensor([row for row, _ in images]),
        input_features=features,
        frame_mask=frame_mask,
        audio_rows=None if features is None else torch.tensor([row for row, _ in clips]),
    )
