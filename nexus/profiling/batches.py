"""What a profiler measures: tokenised samples of a language model, or inputs of an encoder. Shape letters: B samples, T time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.errors import ProfilingError


@dataclass(frozen=True, eq=False)
class ProfileBatch:
    """Tokenised samples: prompt and answer, padded on either side; of an encoder-decoder what its decoder writes."""

    sample_ids: Sequence[str]
    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    loss_mask_BT: Tensor
    """True at the *target tokens* to score (the answer); position 0 is never scored."""
    inputs: Mapping[str, Tensor] | None = None
    """What the model is given beside the ids, each with the batch in front: what an encoder-decoder's encoder reads, or media. Beside
    a single sample it may have any shape that the model takes; such a batch is measured whole, not cut or joined with others."""

    @property
    def num_rows(self) -> int:
        """Number of samples."""
        return len(self.input_ids_BT)


@dataclass(frozen=True, eq=False)
class EncoderProfileBatch:
    """Inputs of an image, audio or text encoder."""

    sample_ids: Sequence[str]
    inputs: Mapping[str, Tensor]
    """The model's keyword arguments, each with the batch in front."""
    labels_B: Tensor | None
    """int64 true classes. Without them a classifier is measured on its own decisions, and has no accuracy."""

    @property
    def num_rows(self) -> int:
        """Number of samples."""
        return len(next(iter(self.inputs.values())))


class BadSamplesError(ProfilingError):
    """Some samples of a batch cannot be measured; the others can be measured again without them."""

    def __init__(self, what: str, reasons: Mapping[str, str]) -> None:
        """`what` says what was expected and what to do, `reasons` maps each bad sample's id to what was found."""
        self.what = what
        self.reasons = dict(reasons)
        shown = "; ".join(f"{sample_id}: {reason}" for sample_id, reason in list(self.reasons.items())[:5])
        more = f" and {len(self.reasons) - 5} more" if len(self.reasons) > 5 else ""
        super().__init__(f"{what} Found {len(self.reasons)} bad samples: {shown}{more}.")

    def __reduce__(self) -> tuple[type[BadSamplesError], tuple[str, dict[str, str]]]:
        return type(self), (self.what, self.reasons)


AnyProfileBatch = ProfileBatch | EncoderProfileBatch


def per_token(inputs: Mapping[str, Tensor], input_ids_BT: Tensor) -> tuple[str, ...]:
    """Return the names of inputs [B, T] that say something of each token of the text, such as `token_type_ids`: they go where the
    ids go. What an encoder reads is its own text and mask."""
    return tuple(
        name
        for name, tensor in inputs.items()
        if tensor.shape == input_ids_BT.shape
        and not tensor.is_floating_point()
        and name not in ("input_ids", "attention_mask")
    )


def rows_of(batch: AnyProfileBatch, rows: slice) -> AnyProfileBatch:
    """Return some rows of a batch; text without the columns that are padding in all of them."""
    sample_ids = list(batch.sample_ids)[rows]
    if isinstance(batch, EncoderProfileBatch):
        inputs = {name: tensor[rows] for name, tensor in batch.inputs.items()}
        return EncoderProfileBatch(sample_ids, inputs, None if batch.labels_B is None else batch.labels_B[rows])
    columns = batch.attention_mask_BT[rows].any(dim=0).nonzero()[:, 0]
    used = (rows, slice(int(columns[0]), int(columns[-1]) + 1))
    own: Mapping[str, Tensor] = batch.inputs or {}
    aligned = per_token(own, batch.input_ids_BT)
    return ProfileBatch(
        sample_ids,
        batch.input_ids_BT[used],
        batch.attention_mask_BT[used],
        batch.loss_mask_BT[used],
        None
        if batch.inputs is None
        else {name: tensor[used if name in aligned else rows] for name, tensor in own.items()},
    )


def split_at(batch: AnyProfileBatch, count: int) -> tuple[AnyProfileBatch, AnyProfileBatch]:
    """Return the first `count` rows and the others, neither of them none."""
    return rows_of(batch, slice(0, count)), rows_of(batch, slice(count, None))


def concatenate_rows(batches: Sequence[AnyProfileBatch]) -> list[AnyProfileBatch]:
    """Return the rows of all batches in as few batches as their shapes allow: text, padded on the left, and inputs of one shape."""
    groups: dict[tuple[object, ...], list[AnyProfileBatch]] = {}
    for batch in batches:
        shapes = tuple((name, tuple(tensor.shape[1:])) for name, tensor in (batch.inputs or {}).items())
        is_labelled = isinstance(batch, EncoderProfileBatch) and batch.labels_B is not None
        groups.setdefault((type(batch).__name__, shapes, is_labelled), []).append(batch)
    return [_concatenated(members) for members in groups.values()]


def _concatenated(members: Sequence[AnyProfileBatch]) -> AnyProfileBatch:
    sample_ids = [sample_id for batch in members for sample_id in batch.sample_ids]
    inputs = {name: torch.cat([(batch.inputs or {})[name] for batch in members]) for name in members[0].inputs or {}}
    texts = [batch for batch in members if isinstance(batch, ProfileBatch)]
    if not texts:
        labels = [
            batch.labels_B for batch in members if isinstance(batch, EncoderProfileBatch) and batch.labels_B is not None
        ]
        return EncoderProfileBatch(sample_ids, inputs, torch.cat(labels) if labels else None)
    width = max(batch.input_ids_BT.shape[1] for batch in texts)

    def stack(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([F.pad(tensor, (width - tensor.shape[1], 0)) for tensor in tensors])

    return ProfileBatch(
        sample_ids,
        stack([batch.input_ids_BT for batch in texts]),
        stack([batch.attention_mask_BT for batch in texts]),
        stack([batch.loss_mask_BT for batch in texts]),
        inputs or None,
    )
