"""Media bytes as the student's towers take them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from nexus.data.media import add_noise
from nexus.errors import DataError
from nexus.student.preprocess import MediaInput, Noise, log_mel_features, media_batch, pixel_values
from nexus.student.presets import StudentSpec, load_student_spec

PRESET = Path(__file__).parents[2] / "configs" / "student" / "quickstart.yaml"


@pytest.fixture(scope="module")
def spec() -> StudentSpec:
    return load_student_spec(PRESET)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def tone(seconds: float, rate: int = 8000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_grey_pixels_arrive_exactly_between_minus_one_and_one(spec: StudentSpec) -> None:
    assert spec.vision is not None
    pixels = pixel_values([png(GREY)], spec.vision)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (1, 1, 16, 16)
    assert torch.equal(pixels[0, 0], torch.from_numpy(GREY.astype(np.float32)) / 127.5 - 1.0)
    assert (pixels.min(), pixels.max()) == (-1.0, 1.0)


def test_images_of_another_size_are_resized(spec: StudentSpec) -> None:
    assert spec.vision is not None
    large = np.kron(np.array([[0, 255], [255, 0]], dtype=np.uint8), np.ones((40, 40), dtype=np.uint8))
    pixels = pixel_values([png(large), png(GREY)], spec.vision)
    assert pixels.shape == (2, 1, 16, 16)
    assert pixels[0, 0, 2, 2] == pytest.approx(-1.0, abs=1e-3)
    assert pixels[0, 0, 2, 13] == pytest.approx(1.0, abs=1e-3)


def test_the_silence_after_a_recording_is_masked(spec: StudentSpec) -> None:
    assert spec.audio is not None
    features, mask = log_mel_features([wav(tone(0.5)), wav(tone(1.0))], spec.audio)
    frames = spec.audio.num_samples // spec.audio.hop_size
    assert features.shape == (2, spec.audio.num_mels, frames)
    assert features.dtype == torch.float32
    assert mask.sum(dim=1).tolist() == [-(-4000 // spec.audio.hop_size), frames]


def test_what_is_longer_than_the_window_is_cut_off_at_its_end(spec: StudentSpec) -> None:
    assert spec.audio is not None
    long = np.concatenate([tone(1.0), np.full(8000, 0.9, dtype=np.float32)])
    cut, whole = (log_mel_features([wav(samples)], spec.audio) for samples in (long, tone(1.0)))
    assert torch.equal(cut[0], whole[0])
    assert cut[1].all()


def test_neighbours_do_not_change_a_recordings_features(spec: StudentSpec) -> None:
    assert spec.audio is not None
    alone, _ = log_mel_features([wav(tone(0.3))], spec.audio)
    beside, _ = log_mel_features([wav(tone(1.0)), wav(tone(0.3))], spec.audio)
    assert torch.equal(alone[0], beside[1])


def test_another_sampling_rate_gives_nearly_the_same_features(spec: StudentSpec) -> None:
    assert spec.audio is not None
    slow, _ = log_mel_features([wav(tone(0.9))], spec.audio)
    fast, _ = log_mel_features([wav(tone(0.9, rate=16_000), rate=16_000)], spec.audio)
    # Resampling leaves ripples far below the tone; where there is energy the two agree.
    loud = slow > slow.max() - 0.5
    assert (slow - fast)[loud].abs().max() < 0.05


def test_noise_belongs_to_the_row_and_is_added_before_the_cut(spec: StudentSpec) -> None:
    assert spec.audio is not None
    samples = tone(1.5)
    noisy, _ = log_mel_features([wav(samples)] * 3, spec.audio, noise=[Noise("a", 10.0), Noise("b", 10.0), None])
    expected, _ = log_mel_features([wav(add_noise(samples, "a", 10.0))], spec.audio)
    assert torch.allclose(noisy[0], expected[0], atol=1e-5)
    assert not torch.equal(noisy[0], noisy[1])
    assert torch.equal(noisy[2], log_mel_features([wav(samples)], spec.audio)[0][0])


def test_each_input_keeps_the_place_of_its_row(spec: StudentSpec) -> None:
    assert spec.audio is not None
    assert spec.vision is not None
    rows = [
        MediaInput(image=png(GREY)),
        MediaInput(),
        MediaInput(audio=wav(tone(0.4)), noise=Noise("c", 20.0)),
        MediaInput(image=png(255 - GREY), audio=wav(tone(0.6))),
    ]
    batch = media_batch(rows, spec)
    assert batch.pixel_rows is not None
    assert batch.audio_rows is not None
    assert batch.pixel_rows.tolist() == [0, 3]
    assert batch.audio_rows.tolist() == [2, 3]
    assert torch.equal(batch.pixel_values, pixel_values([png(GREY), png(255 - GREY)], spec.vision))  # type: ignore[arg-type]
    features, mask = log_mel_features([wav(tone(0.4)), wav(tone(0.6))], spec.audio, noise=[Noise("c", 20.0), None])
    assert torch.equal(batch.input_features, features)  # type: ignore[arg-type]
    assert torch.equal(batch.frame_mask, mask)  # type: ignore[arg-type]
    assert batch.available(4).tolist() == [
        [True, True, False],
        [True, False, False],
        [True, False, True],
        [True, True, True],
    ]


def test_rows_without_media_give_an_empty_batch(spec: StudentSpec) -> None:
    batch = media_batch([MediaInput(), MediaInput()], spec)
    assert (
        batch.pixel_values is batch.pixel_rows is batch.input_features is batch.audio_rows is batch.frame_mask is None
    )


@pytest.mark.parametrize(
    ("tower", "row", "what"),
    [("vision", MediaInput(image=png(GREY)), "an image"), ("audio", MediaInput(audio=wav(tone(0.2))), "a recording")],
)
def test_media_without_a_tower_are_refused(spec: StudentSpec, tower: str, row: MediaInput, what: str) -> None:
    values = spec.to_dict()
    del values[tower]
    with pytest.raises(DataError, match=f"found {what} and no {tower} tower"):
        media_batch([MediaInput(), row], StudentSpec.from_dict(values))


@pytest.mark.parametrize("row", [MediaInput(image=b"no image"), MediaInput(audio=b"no recording")])
def test_bytes_that_are_no_media_are_refused(spec: StudentSpec, row: MediaInput) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        media_batch([row], spec)
