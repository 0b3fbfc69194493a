"""Reads a clip as frames: animated GIF, WebP and PNG, which Pillow decodes, so that no video library is needed."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from nexus.errors import DataError


def decode_frames(data: bytes, num_frames: int) -> list[Image.Image]:
    """Returns `num_frames` RGB frames, evenly spaced from the first to the last; a shorter clip repeats frames.

    Args:
        data: the file's bytes.
        num_frames: at least 1.

    Raises:
        DataError: when the bytes are no animated image, or a damaged one.
    """
    try:
        with Image.open(io.BytesIO(data)) as clip:
            total = int(getattr(clip, "n_frames", 1))
            if total < 2:
                raise ValueError(f"a single {clip.format} image")
            frames = []
            for index in np.linspace(0, total - 1, num_frames).round().astype(int).tolist():
                clip.seek(index)
                frames.append(clip.convert("RGB"))
            return frames
    # Pillow raises these for unknown formats, truncated files and decompression bombs; SyntaxError is its word for a broken PNG, and
    # a GIF that ends inside a header gives IndexError or struct.error.
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        # Pillow names the buffer that it was given, by address.
        reason = " ".join(str(error).split()).partition(" <_io")[0]
        raise DataError(
            f"expected a clip as animated GIF, WebP or PNG; found {len(data)} bytes that are none ({reason}); convert it, for "
            "example with `ffmpeg -i clip.mp4 clip.webp`, or drop the row"
        ) from error
