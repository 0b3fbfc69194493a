"""Decoding of image and audio bytes, and the noise that is fixed by a row's id."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from nexus.data.loader import RecordBatches, iter_records
from nexus.data.media import UsableBatches, add_noise, decode_audio, decode_image, usable
from nexus.data.quarantine import Quarantine, read_quarantine
from nexus.data.records import Record, RowError
from nexus.errors import DataError


def wav_bytes(samples: np.ndarray, rate: int, subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def image_bytes(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format)
    return buffer.getvalue()


def tone(rate: int, hertz: float, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def test_a_gray_png_becomes_rgb_with_three_equal_channels() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = decode_image(image_bytes(Image.fromarray(pixels), "PNG"))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.stack([pixels] * 3, axis=-1))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "GIF", "TIFF"])
def test_lossless_formats_decode_to_the_same_image(file_format: str) -> None:
    image = Image.fromarray(np.full((8, 8), 200, np.uint8))
    assert np.unique(np.asarray(decode_image(image_bytes(image, file_format)))).tolist() == [200]


@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "header only"])
def test_bytes_that_are_no_whole_image_are_one_line_of_data_error(damage: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    png = image_bytes(Image.fromarray(noise), "PNG")
    data = {"text": b"not an image", "empty": b"", "truncated": png[: len(png) // 2], "header only": png[:8]}[damage]
    with pytest.raises(DataError, match="expected an image file") as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)
    assert f"found {len(data)} bytes" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_broken_png_chunk_is_a_data_error() -> None:
    png = bytearray(image_bytes(Image.fromarray(np.zeros((8, 8), np.uint8)), "PNG"))
    png[29] ^= 0xFF  # the checksum of the header chunk
    with pytest.raises(DataError):
        decode_image(bytes(png))


def test_mono_samples_at_the_wanted_rate_come_back_unchanged() -> None:
    samples = tone(8000, 440).astype(np.float32)
    decoded = decode_audio(wav_bytes(samples, 8000), 8000)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, samples)


def test_channels_are_averaged() -> None:
    left, right = tone(8000, 300), tone(8000, 500)
    decoded = decode_audio(wav_bytes(np.stack([left, right], axis=1), 8000), 8000)
    np.testing.assert_allclose(decoded, (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize(("rate", "wanted"), [(16000, 8000), (8000, 16000), (44100, 8000), (22050, 16000)])
def test_resampling_keeps_duration_pitch_and_loudness(rate: int, wanted: int) -> None:
    decoded = decode_audio(wav_bytes(tone(rate, 440), rate), wanted)
    assert abs(len(decoded) - wanted // 2) <= 1
    expected = tone(wanted, 440)[: len(decoded)]
    middle = slice(wanted // 20, -wanted // 20)  # the filter rings at both ends
    np.testing.assert_allclose(decoded[middle], expected[: len(decoded)][middle], atol=0.01)


def test_ogg_opus_is_decoded() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(8000, 440), 8000, format="OGG", subtype="OPUS")
    decoded = decode_audio(buffer.getvalue(), 8000)
    assert np.corrcoef(decoded[:4000], tone(8000, 440)[: len(decoded)])[0, 1] > 0.9


@pytest.mark.parametrize("data", [b"", b"not audio", b"RIFF\x00\x00\x00\x00WAVE"])
def test_bytes_that_are_no_audio_are_one_line_of_data_error(data: bytes) -> None:
    with pytest.raises(DataError, match="expected an audio file") as caught:
        decode_audio(data, 8000)
    assert "\n" not in str(caught.value)


def test_audio_without_samples_is_a_data_error() -> None:
    with pytest.raises(DataError, match="holds no sample"):
        decode_audio(wav_bytes(np.zeros(0), 8000), 8000)


def test_a_row_is_given_the_same_noise_every_time_and_another_row_another_noise() -> None:
    waveform = tone(8000, 440).astype(np.float32)
    first = add_noise(waveform, "audio-test-00001", 10.0)
    assert np.array_equal(first, add_noise(waveform, "audio-test-00001", 10.0))
    other = add_noise(waveform, "audio-test-00002", 10.0)
    assert abs(np.corrcoef(first - waveform, other - waveform)[0, 1]) < 0.1


def test_noise_is_seeded_by_the_first_eight_bytes_of_the_ids_sha256() -> None:
    waveform = tone(8000, 440).astype(np.float32)
    seed = int(hashlib.sha256(b"row").hexdigest()[:16], 16)
    expected = np.random.default_rng(seed).normal(size=len(waveform))
    noise = add_noise(waveform, "row", 0.0).astype(np.float64) - waveform
    assert np.corrcoef(noise, expected)[0, 1] > 0.999999


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 10.0, 30.0])
def test_noise_has_the_asked_power(snr_db: float) -> None:
    waveform = tone(8000, 440, seconds=10).astype(np.float32)
    noisy = add_noise(waveform, "row", snr_db)
    noise = noisy.astype(np.float64) - waveform
    measured = 10 * np.log10(np.mean(waveform.astype(np.float64) ** 2) / np.mean(noise**2))
    # 80,000 samples: the power estimate has a relative standard error of 0.5 %, which is 0.02 dB.
    assert measured == pytest.approx(snr_db, abs=0.1)
    assert noisy.dtype == np.float32


def test_silence_stays_silent() -> None:
    assert not add_noise(np.zeros(100, np.float32), "row", 10.0).any()


# --- rows whose media cannot be decoded -----------------------------------------------------------------------------------------


def damaged(data: bytes) -> bytes:
    """The right first bytes, and half of the rest."""
    return data[: len(data) // 2]


@pytest.fixture
def mixed_rows(tmp_path: Path) -> Path:
    """Six rows: text, an image, damaged ones, a recording."""
    picture = image_bytes(Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)), "PNG")
    sound = wav_bytes(tone(8000, 440), 8000)
    files = {"a.png": picture, "b.png": damaged(picture), "c.wav": sound, "d.wav": sound[:30], "e.gif": b"GIF89a"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    rows = [
        {"prompt": "text"},
        {"prompt": "good", "image": "a.png"},
        {"prompt": "bad", "image": "b.png"},
        {"prompt": "good", "audio": "c.wav"},
        {"prompt": "bad", "audio": "d.wav"},
        {"prompt": "not decoded here", "video": "e.gif"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_whose_media_cannot_be_decoded_go_to_the_quarantine_with_the_reason(mixed_rows: Path) -> None:
    quarantine = Quarantine(mixed_rows.parent / "quarantine", 1.0)
    records = iter_records([mixed_rows], capability="any", quarantine=quarantine)
    assert [record.prompt for record in usable(records, quarantine)] == ["text", "good", "good", "not decoded here"]
    written = list(read_quarantine(mixed_rows.parent / "quarantine"))
    assert [row.row for row in written] == [3, 5]
    assert "cannot be decoded" in written[0].reason
    assert "expected an audio file" in written[1].reason


def test_too_many_unusable_rows_end_the_reading_of_their_file(mixed_rows: Path) -> None:
    quarantine = Quarantine(None, 0.2)
    records = iter_records([mixed_rows], capability="any", quarantine=quarantine)
    with pytest.raises(DataError, match=r"at most 20\.00% bad rows .* found 2 of 6"):
        list(usable(records, quarantine))


def refuse_text(record: Record) -> None:
    if record.prompt == "text":
        raise RowError("expected less, found 'text'")


def test_rows_that_a_further_check_refuses_go_there_too(mixed_rows: Path) -> None:
    quarantine = Quarantine(mixed_rows.parent / "quarantine", 1.0)
    records = iter_records([mixed_rows], capability="any", quarantine=quarantine)
    prompts = [record.prompt for record in usable(records, quarantine, refuse_text)]
    assert prompts == ["good", "good", "not decoded here"]
    written = {row.row: row.reason for row in read_quarantine(mixed_rows.parent / "quarantine")}
    assert written[1] == "expected less, found 'text'"


def stream(path: Path, quarantine: Quarantine, check: Callable[[Record], None] | None = None) -> UsableBatches:
    return UsableBatches(
        RecordBatches([path], capability="any", batch_size=3, seed=1, quarantine=quarantine), quarantine, check
    )


def test_no_epoch_of_batches_holds_a_row_that_the_check_refused(mixed_rows: Path) -> None:
    batches = stream(mixed_rows, Quarantine(mixed_rows.parent / "quarantine", 1.0), refuse_text)
    for _ in range(3):
        prompts = sorted(record.prompt for _ in range(2) for record in batches.next_batch())
        assert prompts == ["good", "good", "not decoded here"]


def test_no_epoch_of_batches_holds_an_unusable_row(mixed_rows: Path) -> None:
    batches = stream(mixed_rows, Quarantine(mixed_rows.parent / "quarantine", 1.0))
    for _ in range(3):
        prompts = sorted(record.prompt for _ in range(2) for record in batches.next_batch())
        assert prompts == ["good", "good", "not decoded here", "text"]


def test_a_stream_that_continues_leaves_out_what_an_earlier_process_found(mixed_rows: Path) -> None:
    folder = mixed_rows.parent / "quarantine"
    first = stream(mixed_rows, Quarantine(folder, 1.0))
    for _ in range(3):  # into the second epoch
        first.next_batch()
    state = first.state_dict()
    expected = [first.next_batch() for _ in range(5)]
    again = stream(mixed_rows, Quarantine(folder, 1.0))
    again.load_state_dict(state)
    assert [again.next_batch() for _ in range(5)] == expected


def test_a_recording_keeps_its_own_rate_when_none_is_asked_for() -> None:
    assert len(decode_audio(wav_bytes(tone(8000, 440), 8000), None)) == 4000
