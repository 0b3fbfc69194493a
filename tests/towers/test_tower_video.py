"""Clips as frames."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from nexus.errors import DataError
from nexus.towers.video import decode_frames


def clip(num_frames: int, kind: str = "GIF") -> bytes:
    """Frame i is grey of brightness 10 i."""
    buffer = io.BytesIO()
    first, *others = (Image.new("RGB", (8, 8), (10 * i, 10 * i, 10 * i)) for i in range(num_frames))
    options = {"lossless": True} if kind == "WEBP" else {}
    first.save(buffer, kind, save_all=True, append_images=others, **options)
    return buffer.getvalue()


def brightness(frames: list[Image.Image]) -> list[int]:
    return [int(np.asarray(frame)[0, 0, 0]) // 10 for frame in frames]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_frames_are_evenly_spaced_from_the_first_to_the_last(kind: str) -> None:
    frames = decode_frames(clip(9, kind), 5)
    assert brightness(frames) == [0, 2, 4, 6, 8]
    assert {frame.mode for frame in frames} == {"RGB"}


def test_a_short_clip_repeats_frames() -> None:
    assert brightness(decode_frames(clip(2), 4)) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"mp4", "cannot identify image file"),
        (clip(1, "PNG"), "a single PNG image"),
        (clip(9)[:150], "index out of range"),
        (clip(9)[:-40], "unpack_from"),
    ],
)
def test_what_is_no_clip_is_told_with_a_remedy(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=r"animated GIF, WebP or PNG.*ffmpeg") as caught:
        decode_frames(data, 16)
    assert reason in str(caught.value)
    assert "0x" not in str(caught.value)
