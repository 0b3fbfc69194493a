"""From records to what the student's towers take; `nexus.student.preprocess` does the decoding."""

from __future__ import annotations

from collections.abc import Sequence

from nexus.data.media import read_media
from nexus.data.records import Record
from nexus.errors import DataError
from nexus.student.memory import MediaBatch
from nexus.student.preprocess import MediaInput, Noise, media_batch
from nexus.student.presets import StudentSpec


def record_media(records: Sequence[Record], spec: StudentSpec, *, snr_db: Sequence[float | None]) -> MediaBatch:
    """The media of `records` in their order, with noise on each recording of its own `snr_db` (None adds none).

    Raises:
        DataError: when media cannot be read or decoded, or the student has no tower for them.
    """
    return media_batch([_media_input(record, snr) for record, snr in zip(records, snr_db, strict=True)], spec)


def _media_input(record: Record, snr_db: float | None) -> MediaInput:
    if record.media is None:
        return MediaInput()
    data = read_media(record.media)
    if record.media.kind == "image":
        return MediaInput(image=data)
    if record.media.kind == "audio":
        return MediaInput(audio=data, noise=None if snr_db is None else Noise(record.id, snr_db))
    raise DataError(
        f"Expected an image or a recording in row {record.id}, found a {record.media.kind}. The student has no tower for it."
    )
