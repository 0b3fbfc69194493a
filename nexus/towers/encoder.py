"""What an encoder of images or recordings gives as a teacher: embeddings, hidden states, and label distributions.

Media are decoded by `nexus.data.media` and prepared by the checkpoint's own processor, all rows of a request together, so that
their lengths agree. Shape letters: B rows, P positions (patches, frames), C classes, E embedding width, H width of the blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nexus.data.media import add_noise, decode_audio, decode_image
from nexus.errors import DataError, TowerLoadError
from nexus.towers.blocks import Passes, one_by_one, recorded_blocks
from nexus.towers.nf4 import classification_heads
from nexus.towers.rows import RowsError
from nexus.towers.video import decode_frames

MAX_ROWS = 64
"""Rows of one forward: 512-pixel images give 1,024 patches each, whose widest activations then take 1 GB in a 400M encoder."""


@dataclass(frozen=True)
class Encoded:
    """An encoder's results, rows in the given order."""

    pooled_BE: np.ndarray
    """float32; what the classification head sees, else the encoder's own pooled output, else the mean over positions."""
    hidden: dict[int, np.ndarray]
    """Layer -> float16 [B, P, H]."""
    label_logprobs_BC: np.ndarray | None
    """float32; None without a classification head."""


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part that encodes: the model itself, or the encoder of one that also writes text (speech recognition)."""
    return model.get_encoder() if model.can_generate() else model


def label_texts(model: PreTrainedModel) -> tuple[str, ...] | None:
    """The labels of a classification head, by class index; None without one."""
    if not classification_heads(model):
        return None
    return tuple(str(label) for _, label in sorted((model.config.id2label or {}).items()))


def prepare_inputs(
    model: PreTrainedModel, processor: Any, row_ids: Sequence[str], media: Sequence[bytes], snr_db: float | None
) -> dict[str, Tensor]:
    """Decoded and processed media as the encoder's keyword arguments, on its device, batch in front.

    Args:
        snr_db: noise added to recordings, the same for a row whenever it is heard; images take none.

    Raises:
        RowsError: rows whose media cannot be decoded.
    """
    num_frames = getattr(model.config, "num_frames", None)
    rate = getattr(processor, "sampling_rate", None)
    decoded: list[Any] = []
    bad = {}
    for row_id, data in zip(row_ids, media, strict=True):
        try:
            if num_frames is not None:
                decoded.append(decode_frames(data, num_frames))
            elif rate is None:
                decoded.append(decode_image(data))
            else:
                waveform = decode_audio(data, rate)
                decoded.append(waveform if snr_db is None else add_noise(waveform, row_id, snr_db))
        except DataError as error:
            bad[row_id] = str(error)
    if bad:
        raise RowsError("Expected media that can be decoded in every row; mend or drop the rows.", bad)
    if num_frames is not None:
        prepared = processor(decoded, return_tensors="pt")
    elif rate is None:
        prepared = processor(images=decoded, return_tensors="pt")
    else:
        prepared = processor(decoded, sampling_rate=rate, return_tensors="pt")
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in prepared.items()
    }


def encode(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    *,
    row_ids: Sequence[str],
    layers: Sequence[int],
    temperature: float,
    passes: Passes = one_by_one,
) -> Encoded:
    """Embeddings, hidden states and label distribution of prepared inputs.

    The softmax runs in float32 on logits / temperature.

    Raises:
        ConfigError: a layer that the encoder does not have.
        TowerLoadError: an encoder that gives scores of another kind than labels, and no hidden states.
        RowsError: rows whose results are not finite (hidden states within float16).
    """
    encoder = encoder_of(model)
    pooled: list[Tensor] = []
    logprobs: list[Tensor] = []
    hidden: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def encode_batch(start: int) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        batch = {name: tensor[start : start + MAX_ROWS] for name, tensor in inputs.items()}
        with torch.inference_mode(), recorded_blocks(encoder, layers) as recorded, _head_input(encoder) as seen:
            output = encoder(**batch)
        logits_BC = getattr(output, "logits", None)
        labels_BC = None if logits_BC is None else torch.log_softmax(logits_BC.float() / temperature, dim=-1).cpu()
        states = {layer: state_BPH.to(torch.float16).cpu() for layer, state_BPH in recorded.items()}
        return _pool(output, seen).float().cpu(), labels_BC, states

    calls = [partial(encode_batch, start) for start in range(0, len(row_ids), MAX_ROWS)]
    for batch_pooled_BE, labels_BC, states in passes(calls):
        pooled.append(batch_pooled_BE)
        if labels_BC is not None:
            logprobs.append(labels_BC)
        for layer, state_BPH in states.items():
            hidden[layer].append(state_BPH)
    pooled_BE = torch.cat(pooled)
    label_logprobs_BC = torch.cat(logprobs) if logprobs else None
    stacked = {layer: torch.cat(states) for layer, states in hidden.items()}
    finite_B = torch.ones(len(row_ids), dtype=torch.bool)
    for result in (pooled_BE, *stacked.values(), *([] if label_logprobs_BC is None else [label_logprobs_BC])):
        finite_B &= torch.isfinite(result).flatten(1).all(dim=1)
    if not finite_B.all():
        raise RowsError(
            "Expected finite results (hidden states within float16) from the teacher for every row; quarantine the rows or profile "
            "other layers.",
            {row_id: "not finite" for row_id, finite in zip(row_ids, finite_B.tolist(), strict=True) if not finite},
        )
    return Encoded(
        pooled_BE.numpy(),
        {layer: state.numpy() for layer, state in stacked.items()},
        None if label_logprobs_BC is None else label_logprobs_BC.numpy(),
    )


def _pool(output: Any, seen_by_head: Sequence[Tensor]) -> Tensor:
    if seen_by_head:
        return seen_by_head[0]
    pooled_BE: Tensor | None = getattr(output, "pooler_output", None)
    if not hasattr(output, "last_hidden_state"):
        raise TowerLoadError(
            f"Expected an encoder that gives its last hidden states or ends in a classification head, found {type(output).__name__} "
            "alone. Name the class without its head as model_class of the teacher."
        )
    states_BPH: Tensor = output.last_hidden_state
    return states_BPH.mean(dim=1) if pooled_BE is None else pooled_BE


@contextmanager
def _head_input(encoder: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Yields a list that a forward fills with what the classification head is given; stays empty without a head."""
    seen: list[Tensor] = []

    # As in `recorded_blocks`: a streamed model has several forwards under way.
    thread = threading.get_ident()

    def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            seen.append(inputs[0])

    handles = [encoder.get_submodule(name).register_forward_pre_hook(record) for name in classification_heads(encoder)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
