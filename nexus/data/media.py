"""Decodes the media of a record (image and audio bytes) and adds the noise that sample recordings are heard with.

Decoding turns whatever the libraries raise into a `DataError` of one line, so that a bad row can be quarantined with its reason.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
from PIL import Image

from nexus.data.quarantine import Quarantine
from nexus.data.records import Media, Record, RowError
from nexus.errors import DataError

if TYPE_CHECKING:
    from nexus.data.loader import RecordBatches


def decode_image(data: bytes) -> Image.Image:
    """Returns the image as a fully loaded RGB image.

    Args:
        data: an image file's bytes, in any format that Pillow reads.

    Raises:
        DataError: when the bytes are not an image, or a damaged one.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    # Pillow raises these for unknown formats, truncated files and decompression bombs; SyntaxError is its word for a broken PNG.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(_unreadable("an image file such as PNG or JPEG", data, error)) from error


def decode_audio(data: bytes, sampling_rate: int | None) -> np.ndarray:
    """Returns the recording as float32 mono samples [T] at `sampling_rate` hertz, channels averaged, resampled when needed.

    Args:
        data: an audio file's bytes, in any format that libsndfile reads (WAV, FLAC, OGG, MP3).
        sampling_rate: hertz, at least 1; None keeps the recording's own.

    Raises:
        DataError: when the bytes are no audio, are damaged, or hold no sample.
    """
    try:
        samples_TC, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, ValueError) as error:
        raise DataError(_unreadable("an audio file such as WAV, FLAC or OGG", data, error)) from error
    if len(samples_TC) == 0:
        raise DataError(_unreadable("an audio file such as WAV, FLAC or OGG", data, "it holds no sample"))
    samples_T = samples_TC.mean(axis=1)
    if sampling_rate is not None and rate != sampling_rate:
        # Not at the top: scipy costs every process 40 MiB and half a second, and most never resample.
        from scipy.signal import resample_poly

        factor = np.gcd(rate, sampling_rate)
        samples_T = resample_poly(samples_T, sampling_rate // factor, rate // factor)
    return samples_T.astype(np.float32)


def add_noise(waveform: np.ndarray, row_id: str, snr_db: float) -> np.ndarray:
    """Returns the waveform [T] plus white Gaussian noise, float32; a row is given the same noise whenever and wherever it is loaded.

    The generator is seeded by the first 8 bytes of the row id's SHA-256. The noise's power is that of the whole waveform divided by
    10^(snr_db / 10); silence therefore stays silent.

    Args:
        waveform: float mono samples [T].
        row_id: the record's id.
        snr_db: signal-to-noise ratio in decibels.
    """
    seed = int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big")
    noise_T = np.random.default_rng(seed).standard_normal(len(waveform))
    power = np.mean(np.square(waveform, dtype=np.float64))
    return (waveform + noise_T * np.sqrt(power / 10 ** (snr_db / 10))).astype(np.float32)


def _unreadable(expected: str, data: bytes, reason: object) -> str:
    # Pillow names the buffer that it was given, by address.
    start = re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", "", " ".join(str(reason).split()))
    return f"expected {expected}; found {len(data)} bytes that cannot be decoded ({start}); replace the file or drop the row"


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
        raise DataError(
            f"Expected the {media.kind} {media.data}, found: {error.strerror}. Restore the file or remove its row."
        ) from None


def check_media(media: Media) -> None:
    """Decode an image or a recording and drop it again; video, which nothing here decodes, passes.

    Raises:
        DataError: when the file cannot be read or decoded.
    """
    if media.kind == "image":
        decode_image(read_media(media))
    elif media.kind == "audio":
        decode_audio(read_media(media), None)


def usable(
    records: Iterable[Record], quarantine: Quarantine, check: Callable[[Record], None] | None = None
) -> Iterator[Record]:
    """The records whose media, if any, can be decoded and that `check` lets pass; the others go to the quarantine with the reason.

    Args:
        check: raises DataError or RowError for a row that cannot be used, such as one that is too long.
    """
    for record in records:
        try:
            if record.media is not None:
                check_media(record.media)
            if check is not None:
                check(record)
        except (DataError, RowError) as error:
            quarantine.add_record(record, str(error))
        else:
            yield record


class UsableBatches:
    """Batches of another stream without the rows that cannot be used (see `usable`); such a batch is smaller.

    Rows are looked at in the stream's first epoch. Later ones, also of a process that continues the run, leave out what stands in
    the quarantine.

    Args:
        stream: batches of records that were read with the same `quarantine`.
        check: as of `usable`.
    """

    def __init__(
        self, stream: RecordBatches, quarantine: Quarantine, check: Callable[[Record], None] | None = None
    ) -> None:
        self._stream = stream
        self._quarantine = quarantine
        self._check = check

    def next_batch(self) -> tuple[Record, ...]:
        """The next batch; smaller where rows were left out."""
        first_epoch = self._stream.epoch == 0
        batch = self._stream.next_batch()
        if first_epoch:
            return tuple(usable(batch, self._quarantine, self._check))
        return tuple(record for record in batch if not self._quarantine.knows(record))

    def state_dict(self) -> dict[str, object]:
        """Where the stream stands, as JSON values."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where `state` was taken."""
        self._stream.load_state_dict(state)
