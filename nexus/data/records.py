"""The record: one row of any input file in nexus's own words, and the normaliser that makes it from the columns people have.

Accepted columns (first match wins):
`messages` (list of role/content) · `prompt` (+ `completion`) · `question` (+ `answer`, with `####` gold as in GSM8K, or a short
answer) · `problem` + `solution` · `instruction` (+ `input`) + `output` · `question` + `choices` + `answer` (MMLU) · `text` ·
`contents`. Media: `image`, `audio` or `video`, as bytes, as `{"bytes": ..., "path": ...}` or as a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MediaKind = Literal["image", "audio", "video"]
MEDIA_KINDS: tuple[MediaKind, ...] = ("image", "audio", "video")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Media:
    """Undecoded media of a row: the file's bytes, or where to read them."""

    kind: MediaKind
    data: bytes | str
    """Encoded bytes (PNG, WAV, OGG, ...) or a path."""


@dataclass(frozen=True)
class Record:
    """One row. `prompt` is what is asked; `completion` is the whole reference text; `answer` is what is scored."""

    id: str
    capability: str
    prompt: str
    completion: str | None = None
    answer: str | None = None
    messages: tuple[Message, ...] | None = None
    media: Media | None = None
    tower: str | None = None
    """A tower, or teacher id, that the row itself names."""


class RowError(ValueError):
    """A row that cannot become a Record; the message says why. The loader quarantines it."""


def normalise_row(row: Mapping[str, object], *, row_id: str, capability: str) -> Record:
    """The Record of one row; `row_id` is used when the row has no `id` column.

    Raises:
        RowError: when no accepted set of columns is there, or a value has the wrong type or is empty.
    """
    raise NotImplementedError
