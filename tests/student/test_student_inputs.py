"""Records become the media of a batch, at their rows."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from nexus.data.records import Media, Record
from nexus.errors import DataError
from nexus.student.inputs import read_media, record_media
from nexus.student.presets import StudentSpec, load_student_spec


@pytest.fixture(scope="module")
def spec() -> StudentSpec:
    return load_student_spec(Path(__file__).parents[2] / "configs" / "student" / "quickstart.yaml")


def _image() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(buffer, format="PNG")
    return buffer.getvalue()


def _sound() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(4000) / 5).astype(np.float32), 8000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def _record(row: int, media: Media | None) -> Record:
    return Record(id=f"row-{row}", capability="any", prompt="What is it?", media=media)


def test_media_keep_their_rows_and_noise_its_recording(spec: StudentSpec) -> None:
    sound = Media("audio", _sound())
    records = [
        _record(0, None),
        _record(1, sound),
        _record(2, Media("image", _image())),
        _record(3, sound),
        _record(3, sound),
    ]
    batch = record_media(records, spec, snr_db=[None, None, None, 3.0, 3.0])
    assert batch.pixel_rows.tolist() == [2]
    assert batch.audio_rows.tolist() == [1, 3, 4]
    assert not torch.allclose(batch.input_features[0], batch.input_features[1])
    assert torch.equal(batch.input_features[1], batch.input_features[2])


def test_rows_without_media_give_an_empty_batch(spec: StudentSpec) -> None:
    batch = record_media([_record(0, None)], spec, snr_db=[None])
    assert batch.pixel_values is None
    assert batch.input_features is None


def test_media_are_read_from_where_the_row_says(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"bytes")
    assert read_media(Media("image", str(tmp_path / "image.png"))) == b"bytes"
    assert read_media(Media("image", b"other")) == b"other"
    with pytest.raises(DataError, match=r"Expected the image .*none\.png, found: No such file.*Restore the file"):
        read_media(Media("image", str(tmp_path / "none.png")))


def test_a_kind_without_a_tower_is_refused(spec: StudentSpec) -> None:
    with pytest.raises(DataError, match=r"found a video\. The student has no tower"):
        record_media([_record(7, Media("video", b"film"))], spec, snr_db=[None])
