"""Prompts with an image, a recording or a clip in them, as a multimodal language model reads them.

The teacher's own processor writes the placeholders and prepares the media; nothing here knows a model. A row is a batch of one: its
media fill tensors of their own shape. Shape letters: P tokens of the prompt, placeholders included.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from nexus.data.media import add_noise, decode_audio, decode_image
from nexus.errors import ConfigError, DataError
from nexus.towers.rows import RowsError
from nexus.towers.video import decode_frames

NUM_FRAMES = 8
"""Frames of a clip; a multiple of the two that video towers join."""


@dataclass(frozen=True)
class MediaPrompt:
    """A prompt in the teacher's ids, and what the model is given beside them."""

    prompt_ids: list[int]
    inputs: Mapping[str, Tensor]
    """Keyword arguments of the model, batch in front; those with one number for each token of the prompt are [1, P]."""

    def inputs_for(self, length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs on `device` for a sequence of `length` tokens that begins with the prompt; what follows is text."""
        placed = {}
        for name, tensor in self.inputs.items():
            if tensor.shape == (1, len(self.prompt_ids)):
                tensor = torch.nn.functional.pad(tensor, (0, length - len(self.prompt_ids)))
            placed[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        return placed


def prepare_prompts(
    processor: Any | None,
    row_ids: Sequence[str],
    prompts: Sequence[str],
    media: Sequence[bytes],
    *,
    teacher_id: str,
    snr_db: float | None = None,
) -> list[MediaPrompt]:
    """Prompts with one image, recording or clip each, in front of the text.

    Args:
        processor: the checkpoint's own; None where it has none, or where its packages are absent.
        snr_db: noise added to recordings, the same for a row whenever it is heard.

    Raises:
        ConfigError: without a processor.
        RowsError: rows whose media cannot be decoded, or are of a kind that the teacher does not take.
    """
    if processor is None:
        raise ConfigError(
            f"Expected a processor of images or recordings for the language model {teacher_id!r}, found none that loads here. Give "
            "it rows of text, or fetch processor_config.json and preprocessor_config.json; some need: pip install torchvision"
        )
    ready, bad = [], {}
    for row_id, prompt, data in zip(row_ids, prompts, media, strict=True):
        try:
            ready.append(_prepare(processor, row_id, prompt, data, snr_db))
        except DataError as error:
            bad[row_id] = str(error)
    if bad:
        raise RowsError("Expected media that the teacher takes in every row; mend or drop the rows.", bad)
    return ready


@contextmanager
def same_noise(row_id: str, device: torch.device) -> Iterator[None]:
    """Some speech towers sample in their forward: within this context they draw the same for a row whenever it is heard."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_seed_of(row_id))
        yield


@contextmanager
def same_noise_in_every_forward(row_id: str, model: PreTrainedModel) -> Iterator[None]:
    """As `same_noise`, where a row is heard by several forwards of `model` that are to be compared."""

    def begin_again(*_: object) -> None:
        torch.manual_seed(_seed_of(row_id))

    handle = model.register_forward_pre_hook(begin_again)
    try:
        with same_noise(row_id, model.device):
            yield
    finally:
        handle.remove()


def _seed_of(row_id: str) -> int:
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:7], "big")


def _prepare(processor: Any, row_id: str, prompt: str, data: bytes, snr_db: float | None) -> MediaPrompt:
    kind, decoded, settings = _decode(processor, row_id, data, snr_db)
    if processor.chat_template:
        content = [{"type": kind}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    else:
        text = f"{getattr(processor, f'{kind}_token')}{prompt}\n"
    named = {"image": "images", "audio": "audio", "video": "videos"}[kind]
    # A template writes its special tokens itself.
    prepared = processor(
        text=[text],
        add_special_tokens=not processor.chat_template,
        return_tensors="pt",
        **{named: [decoded]},
        **settings,
    )
    inputs = {
        name: value
        for name, value in prepared.items()
        if isinstance(value, Tensor) and name not in ("input_ids", "attention_mask")
    }
    return MediaPrompt(prepared["input_ids"][0].tolist(), inputs)


def _decode(
    processor: Any, row_id: str, data: bytes, snr_db: float | None
) -> tuple[Literal["image", "audio", "video"], Any, dict[str, Any]]:
    takes = [kind for kind, part in _PARTS.items() if getattr(processor, part, None) is not None]
    kind = _kind_of(data)
    if kind == "video" and "video" not in takes:
        # Without a tower for clips, an animation is its first frame.
        kind = "image"
    if kind not in takes:
        raise DataError(f"expected {' or '.join(takes)}, found {kind}; give the row to another teacher")
    if kind == "image":
        return kind, decode_image(data), {}
    if kind == "video":
        return kind, decode_frames(data, NUM_FRAMES), {}
    rate = processor.feature_extractor.sampling_rate
    waveform = decode_audio(data, rate)
    return kind, waveform if snr_db is None else add_noise(waveform, row_id, snr_db), {"sampling_rate": rate}


_PARTS: Mapping[Literal["image", "audio", "video"], str] = {
    "image": "image_processor",
    "audio": "feature_extractor",
    "video": "video_processor",
}
"""Medium -> the part of a processor that prepares it."""


def _kind_of(data: bytes) -> Literal["image", "audio", "video"]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return "video" if getattr(image, "n_frames", 1) > 1 else "image"
    except (
        Exception
    ):  # Pillow raises many kinds for what is no image; whether it is a recording shows when it is decoded
        return "audio"
