"""Fixed inputs for a teacher of any role: what the health probe asks after every load and wake, and `nexus teachers check` on top."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import soundfile
from PIL import Image

from nexus.towers.targets import Denoising, ScoreRequest

if TYPE_CHECKING:
    from nexus.towers.loader import LoadedTower

PROMPTS = ("Say hello.", "What is 2 + 2?")
COMPLETIONS = ("Hello.", "4")


def probe_request(tower: LoadedTower, layers: tuple[int, ...] = ()) -> ScoreRequest:
    """Two short rows in what the teacher takes: text for a language model, else media."""
    request = ScoreRequest(("a", "b"), PROMPTS, None, None, 1.0, 8, layers)
    if tower.role in ("causal_lm", "sae"):
        return replace(request, completions=COMPLETIONS)
    if tower.transcriber is not None:
        request = replace(request, completions=COMPLETIONS)
    return replace(request, media=probe_media(tower), denoising=Denoising(num_steps=2))


def probe_media(tower: LoadedTower) -> tuple[bytes, bytes]:
    """Two pictures, recordings or clips, whichever the teacher takes; of several the first of these."""
    processor = tower.processor
    rate = getattr(processor, "sampling_rate", None)
    if rate is None and getattr(processor, "image_processor", None) is None:
        # The processor of a language model has parts; one of them may hear.
        rate = getattr(getattr(processor, "feature_extractor", None), "sampling_rate", None)
    if rate is not None:
        return tone(0, rate), tone(1, rate)
    if tower.role == "encoder" and hasattr(tower.model.config, "num_frames"):
        return clip(0), clip(1)
    return picture(0), picture(1)


def picture(seed: int) -> bytes:
    """A PNG of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def clip(seed: int) -> bytes:
    """An animated GIF of eight frames of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    first, *others = (Image.fromarray(frame) for frame in pixels)
    first.save(buffer, "GIF", save_all=True, append_images=others)
    return buffer.getvalue()


def tone(seed: int, rate: int) -> bytes:
    """Half a second of a sine."""
    buffer = io.BytesIO()
    time_T = np.arange(rate // 2) / rate
    soundfile.write(buffer, 0.3 * np.sin(2 * np.pi * (200 + 150 * seed) * time_T), rate, format="WAV")
    return buffer.getvalue()
