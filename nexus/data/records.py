"""The record: one row of any input file in nexus's own words, and the normaliser that makes it from the columns people have.

Accepted columns, the first line that matches wins (a null value counts as an absent column):

| columns | prompt | completion | answer (what is scored) |
|---|---|---|---|
| `messages`: list of {role, content} | the turns before the last assistant turn | last assistant turn | the completion |
| `prompt`, `completion`? | `prompt` | `completion` | the completion |
| `question`, `choices`, `answer`? (MMLU) | `question`, then `A. ...` lines | the letter | the letter |
| `question`, `answer`? (GSM8K, or a short answer) | `question` | `answer` | what follows `####`, or all of it |
| `problem`, `solution`? (MATH) | `problem` | `solution` | last `\\boxed{}`, else as for `question` |
| `instruction`, `input`?, `output`? (Alpaca) | `instruction`, then `input` | `output` | the completion |
| `text` or `contents` | empty | the text | none |

A row without the optional columns is unlabelled: its completion and answer are None. An `answer` column beside `messages`,
`prompt`, `problem` or `instruction` is scored in place of what the table says, and is the completion where there is no other.
`choices[answer]` is meant where `answer` is a number (from 0); a letter is meant as printed. Lists may be JSON text, because CSV
has no lists. Also read: `id`, `tower`, `capability` (has to agree with the file's), and one of `image`, `audio`, `video` as
bytes, as `{"bytes": ..., "path": ...}` or as a path.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)

MediaKind = Literal["image", "audio", "video"]
MEDIA_KINDS: tuple[MediaKind, ...] = ("image", "audio", "video")

PROMPT_COLUMNS = ("messages", "prompt", "question", "problem", "instruction", "text", "contents")
"""A file needs at least one of these."""
READ_COLUMNS = frozenset(PROMPT_COLUMNS) | {
    *MEDIA_KINDS,
    "completion",
    "answer",
    "choices",
    "solution",
    "input",
    "output",
}
READ_COLUMNS |= {"id", "tower", "capability"}
"""Every column that the normaliser looks at; readers of columnar files leave the others on disk."""

_NOUNS: Mapping[MediaKind, str] = {"image": "an image", "audio": "an audio file", "video": "a video"}
_HEAD_BYTES = 16
"""Enough of a media file to know its format."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_GSM8K_GOLD = re.compile(r"####[ \t]*([^\n#]*?)\s*\Z")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Media:
    """Undecoded media of a row: the file's bytes, or where to read them."""

    kind: MediaKind
    data: bytes | str
    """Encoded bytes (PNG, WAV, OGG, ...) or a path."""


@dataclass(frozen=True)
class Source:
    """Where a record was read, for the quarantine."""

    file: str
    row: int
    """Counted from 1: the line of a JSONL file, else the row below the header."""


@dataclass(frozen=True)
class Record:
    """One row. `prompt` is what is asked; `completion` is the whole reference text; `answer` is what is scored."""

    id: str
    capability: str
    prompt: str
    completion: str | None = None
    answer: str | None = None
    messages: tuple[Message, ...] | None = None
    """What is asked, turn by turn, where the row was a conversation; the completion is not among them."""
    media: Media | None = None
    tower: str | None = None
    """A tower, or teacher id, that the row itself names."""
    source: Source | None = field(default=None, compare=False)
    """Set by the loader; two files with the same content give equal records."""


class RowError(ValueError):
    """A row that cannot become a Record; the message says why. The loader quarantines it."""


def prompt_text(record: Record) -> str:
    """The prompt as students, and teachers without a chat template, read it: a line of its own (nothing for plain text)."""
    return f"{record.prompt}\n" if record.prompt else ""


def has_prompt_column(columns: Collection[str]) -> bool:
    """Whether rows with these columns can become records at all."""
    return any(name in columns for name in PROMPT_COLUMNS)


def normalise_row(row: Mapping[str, object], *, row_id: str, capability: str) -> Record:
    """The Record of one row; `row_id` is used when the row has no `id` column.

    Raises:
        RowError: when no accepted set of columns is there, or a value has the wrong type or is empty.
    """
    own_capability = _text(row, "capability")
    if own_capability not in (None, capability):
        raise RowError(f"expected rows of capability {capability!r}, found {own_capability!r} in column 'capability'")
    messages: tuple[Message, ...] | None = None
    answer = None if _is_choice(row) else _text(row, "answer", numbers=True)
    scored: str | None
    if row.get("messages") is not None:
        messages, completion = _conversation(row["messages"])
        prompt, scored = _render(messages), completion
    elif (text := _text(row, "prompt")) is not None:
        prompt, completion = text, _text(row, "completion", numbers=True)
        scored = completion
    elif (text := _text(row, "question")) is not None:
        if _is_choice(row):
            prompt, completion = _multiple_choice(text, row)
            scored = completion
        else:
            prompt, completion = text, answer
            scored, answer = _gold(answer), None
    elif (text := _text(row, "problem")) is not None:
        prompt, completion = text, _text(row, "solution", numbers=True)
        scored = _boxed(completion) or _gold(completion)
    elif (text := _text(row, "instruction")) is not None:
        context = _text(row, "input", may_be_empty=True)
        prompt, completion = f"{text}\n{context}" if context else text, _text(row, "output", numbers=True)
        scored = completion
    else:
        text = _text(row, "text") or _text(row, "contents")
        if text is None:
            found = ", ".join(sorted(name for name, value in row.items() if value is not None)) or "none"
            raise RowError(
                f"expected a value in one of the columns {', '.join(PROMPT_COLUMNS)}, found values in: {found}"
            )
        prompt, completion, scored, answer = "", text, None, None
    if answer is not None:
        completion = answer if completion is None else completion
        scored = answer
    return Record(
        id=_text(row, "id", numbers=True, may_be_empty=True) or row_id,
        capability=capability,
        prompt=prompt,
        completion=completion,
        answer=None if scored is None else scored.strip(),
        messages=messages,
        media=_media(row),
        tower=_text(row, "tower"),
    )


def check_media_bytes(kind: MediaKind, head: bytes) -> None:
    """Look at the first bytes of an encoded file (12 are enough) for the mark of a format of `kind`.

    Raises:
        RowError: when the file is of another kind or of no known format. A file that passes may still fail to decode.
    """
    found = _sniff(head)
    if found is not None and kind in found.kinds:
        return
    unknown = f"bytes that begin with {head[:8]!r}" if head else "nothing (0 bytes)"
    formats = ", ".join(mark.name for mark in _MARKS if kind in mark.kinds)
    raise RowError(f"expected {_NOUNS[kind]} ({formats}), found {unknown if found is None else found.name}")


def check_media_file(kind: MediaKind, path: Path) -> None:
    """Look at the first bytes of a file for the mark of a format of `kind`.

    Raises:
        RowError: when it cannot be read, or is of another kind or of no known format.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise RowError(f"expected {_NOUNS[kind]} at {path}, found: {reason}") from None
    check_media_bytes(kind, head)


# --- values -------------------------------------------------------------------------------------------------------------------


def _text(row: Mapping[str, object], name: str, *, numbers: bool = False, may_be_empty: bool = False) -> str | None:
    """The text in column `name`, None where it is absent; `numbers` are written out where allowed."""
    value = row.get(name)
    if value is None:
        return None
    if numbers and (type(value) is int or (isinstance(value, float) and math.isfinite(value))):
        return str(value)
    return _checked_text(value, f"column {name!r}", may_be_empty=may_be_empty)


def _checked_text(value: object, where: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise RowError(f"expected text in {where}, found {_kind_of(value)}")
    if not value.strip():
        if may_be_empty:
            return ""
        raise RowError(f"expected text in {where}, found it empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes that were no UTF-8, or half of a surrogate pair in JSON
        raise RowError(f"expected UTF-8 text in {where}, found bytes that are not") from None
    return value


def _kind_of(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"the number {value}"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        bytes: "bytes",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _items(value: object, where: str) -> list[object]:
    """A list, or JSON text of one (CSV has no lists)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"expected a list in {where}, found text that is no JSON list") from None
    if not isinstance(value, list):
        raise RowError(f"expected a list in {where}, found {_kind_of(value)}")
    if not value:
        raise RowError(f"expected a list in {where}, found it empty")
    return value


# --- column sets --------------------------------------------------------------------------------------------------------------


def _conversation(value: object) -> tuple[tuple[Message, ...], str | None]:
    """The turns that are asked, and the last assistant turn where the conversation ends with one."""
    turns = [_message(item, index) for index, item in enumerate(_items(value, "column 'messages'"), start=1)]
    completion = turns.pop().content if turns[-1].role == "assistant" else None
    if not any(turn.role == "user" for turn in turns):
        raise RowError("expected a user turn before the answer in column 'messages', found none")
    return tuple(turns), completion


def _message(item: object, index: int) -> Message:
    where = f"turn {index} of column 'messages'"
    if not isinstance(item, Mapping):
        raise RowError(f"expected an object with role and content in {where}, found {_kind_of(item)}")
    role = item.get("role")
    if role not in ROLES:
        raise RowError(f"expected the role {', '.join(ROLES)} in {where}, found {role!r}")
    return Message(cast(Role, role), _checked_text(item.get("content"), f"the content of {where}"))


def _render(messages: tuple[Message, ...]) -> str:
    """A lone question as it stands; longer conversations with the role before each turn."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages)


def _is_choice(row: Mapping[str, object]) -> bool:
    """Whether `answer` names one of `choices`; columns of an earlier line of the table win."""
    return (
        row.get("choices") is not None
        and row.get("question") is not None
        and row.get("messages") is None
        and row.get("prompt") is None
    )


def _multiple_choice(question: str, row: Mapping[str, object]) -> tuple[str, str | None]:
    """The question with its lettered choices, and the letter of the right one."""
    choices = [_choice(item) for item in _items(row["choices"], "column 'choices'")]
    if not 2 <= len(choices) <= len(_LETTERS):
        raise RowError(f"expected 2 to {len(_LETTERS)} entries in column 'choices', found {len(choices)}")
    letters = _LETTERS[: len(choices)]
    prompt = "\n".join((question, *(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))))
    answer = _text(row, "answer", numbers=True)
    if answer is None:
        return prompt, None
    answer = answer.strip()
    if answer.isdecimal() and answer.isascii() and len(answer) <= 2 and int(answer) < len(choices):
        return prompt, letters[int(answer)]
    if len(answer) == 1 and answer.upper() in letters:
        return prompt, answer.upper()
    raise RowError(f"expected 0 to {len(choices) - 1} or A to {letters[-1]} in column 'answer', found {answer[:40]!r}")


def _choice(item: object) -> str:
    if type(item) is int or (isinstance(item, float) and math.isfinite(item)):
        return str(item)
    return _checked_text(item, "an entry of column 'choices'")


def _gold(answer: str | None) -> str | None:
    """What follows the `####` of the last line, without thousands separators; all of a text that has no such mark."""
    if answer is None or (match := _GSM8K_GOLD.search(answer)) is None:
        return answer
    if not match[1]:
        raise RowError("expected the gold answer after '####', found nothing")
    return _THOUSANDS.sub("", match[1])


def _boxed(solution: str | None) -> str | None:
    r"""Content of the last complete `\boxed{...}`, braces inside it balanced; None where there is none or it is empty."""
    mark = r"\boxed{"
    if solution is None or (start := solution.rfind(mark)) < 0:
        return None
    depth = 0
    for end in range(start + len(mark) - 1, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0:
            return solution[start + len(mark) : end].strip() or None
    return None


# --- media --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mark:
    """The bytes that tell a format: `magic` at `offset`, and `then` at offset 8 for RIFF containers."""

    name: str
    kinds: tuple[MediaKind, ...]
    magic: bytes
    offset: int = 0
    then: bytes = b""


_MARKS = (
    _Mark("PNG", ("image",), b"\x89PNG\r\n\x1a\n"),
    _Mark("JPEG", ("image",), b"\xff\xd8\xff"),
    _Mark("GIF", ("image", "video"), b"GIF8"),
    _Mark("WEBP", ("image",), b"RIFF", then=b"WEBP"),
    _Mark("WAV", ("audio",), b"RIFF", then=b"WAVE"),
    _Mark("OGG", ("audio",), b"OggS"),
    _Mark("FLAC", ("audio",), b"fLaC"),
    _Mark("MP3", ("audio",), b"ID3"),
    _Mark("MP4", ("video",), b"ftyp", offset=4),
    _Mark("WEBM", ("video",), b"\x1aE\xdf\xa3"),
    _Mark("AVI", ("video",), b"RIFF", then=b"AVI "),
)
_MP3 = next(mark for mark in _MARKS if mark.name == "MP3")


def _sniff(head: bytes) -> _Mark | None:
    for mark in _MARKS:
        if head.startswith(mark.magic, mark.offset) and head.startswith(mark.then, 8 if mark.then else 0):
            return mark
    # An MP3 without a tag begins with a frame: 11 set bits, a version that is not reserved, layer III.
    if len(head) >= 2 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2 and head[1] & 0x18 != 0x08:
        return _MP3
    return None


def _media(row: Mapping[str, object]) -> Media | None:
    kinds = [kind for kind in MEDIA_KINDS if row.get(kind) is not None]
    if not kinds:
        return None
    if len(kinds) > 1:
        raise RowError(f"expected one of the columns {', '.join(MEDIA_KINDS)} in a row, found {' and '.join(kinds)}")
    kind = kinds[0]
    value = row[kind]
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        check_media_bytes(kind, value[:_HEAD_BYTES])
        return Media(kind, value)
    if not isinstance(value, str):
        raise RowError(f"expected bytes or a path in column {kind!r}, found {_kind_of(value)}")
    return Media(kind, _checked_text(value, f"column {kind!r}"))
